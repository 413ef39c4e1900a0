"""The state of decoding: the KV cache, and beside it the lists of critical tokens with the plan that shares them."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from hshare_jax.config import HShareConfig
from hshare_jax.kernels.reference import EMPTY
from hshare_jax.kv_cache import KVCache, init_cache
from hshare_jax.models.config import ModelConfig
from hshare_jax.share_plan import identity_plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedLists:
    """Critical tokens of every layer in one buffer, and what is needed to choose them anew."""

    token_indices: Array  # [L, B, J, C] int32 slots, ascending, padded with EMPTY
    source: Array  # [B, L, J] int32, the share plan
    channels: Array  # [B, L, K, R] int32, label channels
    labels: tuple[Array, ...]  # L x [B, K, S, R], the keys on those channels
    recent_start: Array  # [B] int32, first slot of the recent range, set at the last refresh
    age: Array  # [B] int32, decode steps since the plan was found
    config: HShareConfig = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """All that a decode step reads and writes. `shared` is None for dense decoding."""

    cache: KVCache
    shared: SharedLists | None


def init_state(
    config: ModelConfig,
    batch_size: int,
    capacity: int,
    *,
    hshare: HShareConfig | None = None,
    dtype: jnp.dtype | type = jnp.float32,
) -> DecodeState:
    """Returns an empty state.

    Args:
        config: the model.
        batch_size: B.
        capacity: tokens that each row must be able to hold, prompt and output together; rounds up to whole blocks.
        hshare: how to share critical tokens; None decodes dense.
        dtype: of keys, values and labels.

    Raises:
        ValueError: a size below 1, a capacity beyond the model's positions, or a dtype that is no float.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if not 1 <= capacity <= config.max_positions:
        raise ValueError(f"capacity={capacity} must lie between 1 and the model's max_positions={config.max_positions}")
    name = str(getattr(dtype, "__name__", dtype))
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={name} must be float32, bfloat16 or float16")
    cache = init_cache(config, batch_size, capacity, jnp.dtype(dtype))
    return DecodeState(cache, None if hshare is None else _init_lists(config, hshare, cache))


def _init_lists(model: ModelConfig, config: HShareConfig, cache: KVCache) -> SharedLists:
    B = cache.lengths.shape[0]
    L, K, J, R = model.num_layers, model.num_kv_heads, config.num_lists(model), config.num_label_channels(model)
    return SharedLists(
        token_indices=jnp.full((L, B, J, config.num_critical), EMPTY, jnp.int32),
        source=identity_plan(B, L, J),
        channels=jnp.tile(jnp.arange(R, dtype=jnp.int32), (B, L, K, 1)),
        labels=tuple(jnp.zeros((B, K, cache.capacity, R), cache.keys[0].dtype) for _ in range(L)),
        recent_start=jnp.zeros((B,), jnp.int32),
        age=jnp.zeros((B,), jnp.int32),
        config=config,
    )
