"""Sparse decoding for LLaMA-family models in JAX without training (HShare), and cross-layer KV sharing.

Importing the package loads nothing else: each name below is imported when it is first used.
"""

import os
from typing import TYPE_CHECKING

from hshare_jax.lazy import make_lazy

# Only configurations and tokenizers of transformers are used, so its advice to install torch would mislead.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

if TYPE_CHECKING:
    from hshare_jax.calibration import Calibration, calibrate
    from hshare_jax.decode_state import DecodeState, init_state
    from hshare_jax.decode_step import decode_step
    from hshare_jax.errors import CheckpointError, SettingError
    from hshare_jax.evaluation.teacher_forcing import StepScores, forced_logits, score_steps, token_agreement
    from hshare_jax.generate import Generation, StreamedText, Timing, Usage, generate, stream
    from hshare_jax.kv_cache import KVCache
    from hshare_jax.mesh import make_mesh
    from hshare_jax.methods.base import Method, MethodState
    from hshare_jax.methods.hshare.method import HShare
    from hshare_jax.methods.hshare.plan_files import load_channels, load_plan, save_channels, save_plan
    from hshare_jax.methods.hshare.settings import HShareSettings, PlanSearch
    from hshare_jax.methods.hshare.share_plan import SharePlan, kv_layer_plan
    from hshare_jax.methods.hshare.shared_lists import SharedLists
    from hshare_jax.models.config import ModelConfig, RopeConfig
    from hshare_jax.models.pretrained import Model, load_model, save_model
    from hshare_jax.prefill import prefill, refit
    from hshare_jax.sampling_params import SamplingParams

_HOMES = {
    "calibration": ("Calibration", "calibrate"),
    "decode_state": ("DecodeState", "init_state"),
    "decode_step": ("decode_step",),
    "errors": ("CheckpointError", "SettingError"),
    "evaluation.teacher_forcing": ("StepScores", "forced_logits", "score_steps", "token_agreement"),
    "generate": ("Generation", "Usage", "StreamedText", "Timing", "generate", "stream"),
    "kv_cache": ("KVCache",),
    "mesh": ("make_mesh",),
    "methods.base": ("Method", "MethodState"),
    "methods.hshare.method": ("HShare",),
    "methods.hshare.plan_files": ("load_channels", "load_plan", "save_channels", "save_plan"),
    "methods.hshare.settings": ("HShareSettings", "PlanSearch"),
    "methods.hshare.share_plan": ("SharePlan", "kv_layer_plan"),
    "methods.hshare.shared_lists": ("SharedLists",),
    "models.config": ("ModelConfig", "RopeConfig"),
    "models.pretrained": ("Model", "load_model", "save_model"),
    "prefill": ("prefill", "refit"),
    "sampling_params": ("SamplingParams",),
}

__all__ = [
    "Calibration",
    "CheckpointError",
    "DecodeState",
    "Generation",
    "HShare",
    "HShareSettings",
    "KVCache",
    "Method",
    "MethodState",
    "Model",
    "ModelConfig",
    "PlanSearch",
    "RopeConfig",
    "SamplingParams",
    "SettingError",
    "SharePlan",
    "SharedLists",
    "StepScores",
    "StreamedText",
    "Timing",
    "Usage",
    "calibrate",
    "decode_step",
    "forced_logits",
    "generate",
    "init_state",
    "kv_layer_plan",
    "load_channels",
    "load_model",
    "load_plan",
    "make_mesh",
    "prefill",
    "refit",
    "save_channels",
    "save_model",
    "save_plan",
    "score_steps",
    "stream",
    "token_agreement",
]

make_lazy(__name__, _HOMES)
