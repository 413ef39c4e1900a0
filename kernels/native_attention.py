"""Decode attention on a CPU by the library of CPU kernels. kernels/native/attention.h is the code."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from hshare_jax.kernels.int8_rows import Int8Rows, Rows
from hshare_jax.kernels.native_library import call_library
from hshare_jax.kernels.tail import Part, Tail
from hshare_jax.shapes import Lists, Source


def dense_decode(
    q: Float[Array, "B N H"],
    keys: Rows,
    values: Rows,
    lengths: Int[Array, "B"],
    *,
    window: int | None = None,
) -> Float[Array, "B N H"]:
    """`api.dense_decode`; a key or value is read once for all query heads of its group."""
    cache, scales = cache_arrays(keys, values)
    return call_library("dense_decode", q, q, *cache, lengths, *scales, window=window_number(window))


def sparse_decode(
    q: Float[Array, "B N H"],
    keys: Rows,
    values: Rows,
    lists: Lists,
    source: Source,
    layer: int,
    lengths: Int[Array, "B"],
    recent_start: Int[Array, "B"],
    *,
    num_sinks: int,
    max_recent: int,
    window: int | None = None,
    min_length: int = 0,
    tail: Tail | None = None,
) -> Float[Array, "B N H"]:
    """`api.sparse_decode`. Lists, plans and lengths that point outside the arrays read nothing."""
    cache, scales = cache_arrays(keys, values)
    return call_library(
        "sparse_decode", q, q, *cache, lists, source, lengths, recent_start, *scales, *jax.tree.leaves(tail),
        layer=np.int64(layer), num_sinks=np.int64(num_sinks), max_recent=np.int64(max_recent),
        window=window_number(window), min_length=np.int64(min_length),
    )  # fmt: skip


def split_decode(
    q: Float[Array, "B N H"],
    keys: Rows,
    values: Rows,
    listed: Int[Array, "B J C"],
    lengths: Int[Array, "B"],
    recent_start: Int[Array, "B"],
    *,
    num_sinks: int,
    window: int | None = None,
) -> tuple[Part, Part]:
    """`api.split_decode`. Slots of lists that point outside the cache count for nothing."""
    B, N, H = q.shape
    told = jax.ShapeDtypeStruct((B, 2, N, H + 3), jnp.float32)  # the attention, log of the sum, mean score, number
    cache, scales = cache_arrays(keys, values)
    parts = call_library(
        "split_decode", told, q, *cache, listed, lengths, recent_start, *scales,
        num_sinks=np.int64(num_sinks), window=window_number(window),
    )  # fmt: skip
    read, rest = (
        Part(part[..., :H], part[..., H], part[..., H + 1], part[..., H + 2].astype(jnp.int32))
        for part in (parts[:, 0], parts[:, 1])
    )
    return read, rest


def cache_arrays(keys: Rows, values: Rows) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    """The numbers of keys and values, and their scales if they have 8 bits."""
    if isinstance(keys, Int8Rows) and isinstance(values, Int8Rows):
        return (keys.qvalue, values.qvalue), (keys.scale, values.scale)
    return (keys, values), ()


def window_number(window: int | None) -> np.int64:
    """A window as the library takes it: -1 if there is none."""
    return np.int64(-1 if window is None else window)
