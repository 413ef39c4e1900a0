"""The methods beside HShare, one file each: what a user would take instead. Their settings are a state's `method`."""

from hshare_jax.selectors.double_sparsity import double_sparsity
from hshare_jax.selectors.exact_topk import exact_topk
from hshare_jax.selectors.h2o import H2O
from hshare_jax.selectors.quest import Quest
from hshare_jax.selectors.snapkv import SnapKV
from hshare_jax.selectors.streaming_llm import StreamingLLM

__all__ = ["H2O", "Quest", "SnapKV", "StreamingLLM", "double_sparsity", "exact_topk"]
