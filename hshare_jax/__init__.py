"""Sparse decoding for LLaMA-family models in JAX, without training: HShare's shared critical tokens."""

import os

# Of transformers only configurations and tokenisers are used; its advice to install torch would mislead.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from hshare_jax.agreement import token_agreement
from hshare_jax.config import HShareConfig
from hshare_jax.decode import decode_step
from hshare_jax.decode_state import DecodeState, SharedLists, init_state
from hshare_jax.generate import Generation, Timing, generate, stream
from hshare_jax.kv_cache import KVCache
from hshare_jax.models.config import ModelConfig, RopeConfig
from hshare_jax.models.pretrained import Model, load_model, save_model
from hshare_jax.models.weights import CheckpointError
from hshare_jax.prefill import prefill
from hshare_jax.sampling import SamplingConfig

__all__ = [
    "CheckpointError",
    "DecodeState",
    "Generation",
    "HShareConfig",
    "KVCache",
    "Model",
    "ModelConfig",
    "RopeConfig",
    "SamplingConfig",
    "SharedLists",
    "Timing",
    "decode_step",
    "generate",
    "init_state",
    "load_model",
    "prefill",
    "save_model",
    "stream",
    "token_agreement",
]
