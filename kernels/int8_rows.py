"""Keys and values in 8 bits: the row of each token and head has a scale of its own."""

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

KVCacheDType = Literal["auto", "int8"]  # auto: floats, in the dtype that the model computes in
KV_CACHE_DTYPES: tuple[str, ...] = get_args(KVCacheDType)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Rows:
    """Keys or values of one layer that stand for floats: row = qvalue * scale.

    Each token and head has a scale. KIVI keeps values so (arXiv 2402.02750, section 3), in fewer bits, and gives keys a
    scale for each channel. The largest magnitude of a row is 127 times its scale. In a kernel the arrays are
    references. New tokens are [B, T, K, H] and [B, T, K] instead. Fields are named as in qwix.
    """

    qvalue: Any  # [B, K, S, H] int8
    scale: Any  # [B, K, S] float32
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})  # of the floats

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, K, S, H)."""
        return self.qvalue.shape

    def to_floats(self) -> Float[Array, "*rows H"]:
        """The floats in `dtype`, computed in float32."""
        return (self.qvalue.astype(jnp.float32) * self.scale[..., None]).astype(self.dtype)


Rows = Float[Array, "B K S H"] | Int8Rows  # one layer's keys or values
NewRows = Float[Array, "B T K H"] | Int8Rows  # those of new tokens


def quantise_rows(x: Float[Array, "*rows H"]) -> Int8Rows:
    """The 8-bit codes nearest to rows, and a scale for each row.

    A row that holds NaN or infinity becomes NaN, and one whose numbers are below 1e-36 becomes zeros.
    """
    wide = x.astype(jnp.float32)
    scale = jnp.abs(wide).max(axis=-1) * (1 / 127)
    # The inverses are written out, as in `labels.quantise`.
    inverse = 1 / jnp.where(scale >= jnp.finfo(jnp.float32).tiny, scale, 1)
    return Int8Rows(jnp.round(wide * inverse[..., None]).astype(jnp.int8), scale, jnp.dtype(x.dtype))


def as_cached(cache: Rows, new: Float[Array, "*rows H"]) -> Array | Int8Rows:
    """New rows, of the same shape, in the dtype of a cache; in 8 bits where the cache is."""
    new = new.astype(cache.dtype)
    return quantise_rows(new) if isinstance(cache, Int8Rows) else new


def row_bytes(cache: Rows) -> int:
    """The bytes of one row, with its scale."""
    return sum(math.prod(array.shape[3:]) * array.dtype.itemsize for array in jax.tree.leaves(cache))


def row_floats(rows: Array | Int8Rows) -> Array:
    """The floats that rows are, or stand for."""
    return rows.to_floats() if isinstance(rows, Int8Rows) else rows
