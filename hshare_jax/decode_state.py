"""The state of decoding: the KV cache, and what a sparse method carries from step to step."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from hshare_jax.errors import SettingError, check_one_of
from hshare_jax.kv_cache import KVCache, init_cache
from hshare_jax.methods.base import Method, MethodState, count_dense
from hshare_jax.models.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything that a decode step reads and writes, except the parameters."""

    cache: KVCache
    method_state: MethodState | None  # None decodes dense


def init_state(
    config: ModelConfig,
    batch_size: int,
    capacity: int,
    *,
    method: Method | None = None,
    dtype: jnp.dtype | type = jnp.float32,
) -> DecodeState:
    """An empty state.

    Args:
        config: the model.
        batch_size: B.
        capacity: tokens that each row must be able to hold, prompt and output together. It rounds up to whole blocks.
        method: how decode steps read the cache (`hshare_jax.methods`); None decodes dense.
        dtype: of keys, values and labels: float32, bfloat16 or float16.

    Raises:
        SettingError: a size below 1, a capacity beyond the model's positions, or another dtype.
        ValueError: a plan or channels of the method that are not for this model.
    """
    if batch_size < 1:
        raise SettingError("batch_size", batch_size, "must be at least 1")
    if not 1 <= capacity <= config.max_positions:
        rule = f"must lie between 1 and the model's max_positions={config.max_positions}"
        raise SettingError("capacity", capacity, rule)
    check_one_of("dtype", str(getattr(dtype, "__name__", dtype)), ("float32", "bfloat16", "float16"))
    cache = init_cache(config, batch_size, capacity, jnp.dtype(dtype))
    return DecodeState(cache, None if method is None else method.start(config, cache))


def count_reads(state: DecodeState, config: ModelConfig) -> Float[Array, "B"]:
    """Tokens that the last decode step read, the mean over layers and heads."""
    if state.method_state is None:
        return count_dense(state.cache, config).mean(axis=0, dtype=jnp.float32)
    return state.method_state.count_reads(state.cache, config)
