"""The methods beside HShare, one file each: what a user would take instead. Their settings are a state's `method`."""

from hshare_jax.methods.double_sparsity import double_sparsity
from hshare_jax.methods.exact_topk import exact_topk
from hshare_jax.methods.h2o import H2O
from hshare_jax.methods.quest import Quest
from hshare_jax.methods.snapkv import SnapKV
from hshare_jax.methods.streaming_llm import StreamingLLM

__all__ = ["H2O", "Quest", "SnapKV", "StreamingLLM", "double_sparsity", "exact_topk"]
