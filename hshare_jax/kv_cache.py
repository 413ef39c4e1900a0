"""The KV cache: per-layer arrays of keys and values, and how many slots each row has filled."""

import dataclasses
from dataclasses import field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hshare_jax.kernels.int8_rows import Int8Rows, KVCacheDType, Rows
from hshare_jax.mesh import dims
from hshare_jax.models.config import ModelConfig
from hshare_jax.shapes import CACHE_BLOCK


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Rotated keys, and values; slot s of a row holds the row's token at position s.

    There is one array, or `Int8Rows`, for each layer that has keys and values (`ModelConfig.kv_layers`). Layer l reads
    number `kv_index(l)`. A donated step updates each array in place; one stacked array would be copied on every step.
    """

    keys: tuple[Any, ...] = field(metadata=dims("B K S"))  # `Rows` [B, K, S, H], one for each KV layer
    values: tuple[Any, ...] = field(metadata=dims("B K S"))
    lengths: Array = field(metadata=dims("B"))  # int32, filled slots

    @property
    def capacity(self) -> int:
        """S, the number of slots of each row."""
        return self.keys[0].shape[2]


def init_cache(
    config: ModelConfig, batch_size: int, capacity: int, dtype: jnp.dtype, kv_cache_dtype: KVCacheDType = "auto"
) -> KVCache:
    """An empty cache. `capacity` rounds up to whole prefill blocks, and `kv_cache_dtype` is that of `init_state`."""
    S = -(-capacity // CACHE_BLOCK) * CACHE_BLOCK
    shape = (batch_size, config.num_kv_heads, S, config.head_dim)

    def empty() -> Rows:
        if kv_cache_dtype == "int8":
            return Int8Rows(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:3], jnp.float32), jnp.dtype(dtype))
        return jnp.zeros(shape, dtype)

    return KVCache(
        keys=tuple(empty() for _ in config.kv_layers),
        values=tuple(empty() for _ in config.kv_layers),
        lengths=jnp.zeros((batch_size,), jnp.int32),
    )


def replace_layer(arrays: tuple, index: int, new: object) -> tuple:
    """The tuple with one layer's entry replaced."""
    return (*arrays[:index], new, *arrays[index + 1 :])
