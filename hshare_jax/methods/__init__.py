"""Sparse methods, one file each. A method decodes with few of the cached tokens; HShare is the folder `hshare`."""

from hshare_jax.methods.double_sparsity import double_sparsity
from hshare_jax.methods.exact_topk import exact_topk
from hshare_jax.methods.h2o import H2O
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.hshare.settings import HShareSettings, PlanSearch
from hshare_jax.methods.quest import Quest
from hshare_jax.methods.snapkv import SnapKV
from hshare_jax.methods.streaming_llm import StreamingLLM

__all__ = [
    "H2O",
    "HShare",
    "HShareSettings",
    "PlanSearch",
    "Quest",
    "SnapKV",
    "StreamingLLM",
    "double_sparsity",
    "exact_topk",
]
