"""Sparse methods, one file each. A method decodes with few of the cached tokens; HShare is the folder `hshare`.

Importing the package loads nothing else: each name below is imported when it is first used.
"""

from typing import TYPE_CHECKING

from hshare_jax.lazy import make_lazy

if TYPE_CHECKING:
    from hshare_jax.methods.double_sparsity import double_sparsity
    from hshare_jax.methods.exact_topk import exact_topk
    from hshare_jax.methods.h2o import H2O
    from hshare_jax.methods.hshare.method import HShare
    from hshare_jax.methods.hshare.settings import HShareSettings, PlanSearch
    from hshare_jax.methods.quest import Quest
    from hshare_jax.methods.snapkv import SnapKV
    from hshare_jax.methods.streaming_llm import StreamingLLM

_HOMES = {
    "double_sparsity": ("double_sparsity",),
    "exact_topk": ("exact_topk",),
    "h2o": ("H2O",),
    "hshare.method": ("HShare",),
    "hshare.settings": ("HShareSettings", "PlanSearch"),
    "quest": ("Quest",),
    "snapkv": ("SnapKV",),
    "streaming_llm": ("StreamingLLM",),
}

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

make_lazy(__name__, _HOMES)
