"""Sparse decoding for LLaMA-family models in JAX without training (HShare), and cross-layer KV sharing with it."""

import os

# Of transformers only configurations and tokenisers are used; its advice to install torch would mislead.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from hshare_jax.calibration import Calibration, calibrate, load_channels, load_plan, save_channels, save_plan
from hshare_jax.decode_state import DecodeState, for_decoding, init_state
from hshare_jax.decode_step import decode_step
from hshare_jax.errors import CheckpointError
from hshare_jax.evaluation.teacher_forcing import StepScores, forced_logits, score_steps, token_agreement
from hshare_jax.generate import Generation, ReadStatistics, Timing, generate, stream
from hshare_jax.kv_cache import KVCache
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.methods.hshare.share_plan import SharePlan, kv_layer_plan
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.models.config import ModelConfig, RopeConfig
from hshare_jax.models.pretrained import Model, load_model, save_model
from hshare_jax.prefill import prefill
from hshare_jax.sampling import SamplingConfig

__all__ = [
    "Calibration",
    "CheckpointError",
    "DecodeState",
    "Generation",
    "HShareSettings",
    "KVCache",
    "Model",
    "ModelConfig",
    "ReadStatistics",
    "RopeConfig",
    "SamplingConfig",
    "SharePlan",
    "SharedLists",
    "StepScores",
    "Timing",
    "calibrate",
    "decode_step",
    "for_decoding",
    "forced_logits",
    "generate",
    "init_state",
    "kv_layer_plan",
    "load_channels",
    "load_model",
    "load_plan",
    "prefill",
    "save_channels",
    "save_model",
    "save_plan",
    "score_steps",
    "stream",
    "token_agreement",
]
