"""The slots that sparse attention reads: which they are, their cached rows, and the weights that fall on them."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from hshare_jax.kernels.int8_rows import Rows, row_floats
from hshare_jax.kernels.masked_softmax import MASKED
from hshare_jax.shapes import EMPTY


def slots_to_read(
    listed: Int[Array, "B J C"],
    lengths: Int[Array, "B"],
    recent_start: Int[Array, "B"],
    *,
    num_sinks: int,
    max_recent: int,
    window: int | None,
) -> Int[Array, "B J W"]:
    """The slots that `api.sparse_decode` reads for each list, each slot once, padded with EMPTY.

    Args:
        listed: the lists that are read, found through the plan.
        lengths, recent_start, num_sinks, max_recent, window: as `api.sparse_decode` takes them.
    """
    B, J, _ = listed.shape
    recent = recent_start[:, None] + jnp.arange(max_recent, dtype=jnp.int32)[None, :]
    recent = jnp.where(recent < lengths[:, None], recent, EMPTY)
    sinks = jnp.arange(num_sinks, dtype=jnp.int32)[None, :]
    # In a short row the sinks and the recent range overlap. A slot in both is read as a recent one.
    sinks = jnp.where(sinks < recent_start[:, None], sinks, EMPTY)
    ranges = jnp.concatenate([sinks, recent], axis=1)
    slots = jnp.concatenate([jnp.broadcast_to(ranges[:, None, :], (B, J, ranges.shape[1])), listed], axis=2)
    return slots if window is None else jnp.where(slots >= (lengths - window)[:, None, None], slots, EMPTY)


def mark_listed(
    listed: Int[Array, "B J C"], recent_start: Int[Array, "B"], num_sinks: int, capacity: int
) -> Bool[Array, "B J S"]:
    """The slots of these lists, of the sinks and of the recent range."""
    B, J, _ = listed.shape
    slots, start = jnp.arange(capacity)[None, :], recent_start[:, None]
    is_ranged = (slots < jnp.minimum(num_sinks, start)) | (slots >= start)
    rows, lists = jnp.arange(B)[:, None, None], jnp.arange(J)[None, :, None]
    marks = jnp.broadcast_to(is_ranged[:, None, :], (B, J, capacity))
    return marks.at[rows, lists, jnp.where(listed == EMPTY, capacity, listed)].set(True, mode="drop")


def take_rows(cache: Rows, slots: Int[Array, "B J W"]) -> Float[Array, "B J W H"]:
    """The cached rows of each list's slots, as floats. For EMPTY it is the row of slot 0."""
    B, K, _, H = cache.shape
    # The lists of one kv head are gathered together: [B, K, (J // K) * W].
    flat = jnp.maximum(slots, 0).reshape(B, K, -1)

    def take(array: Array) -> Array:
        index = flat[..., None] if array.ndim == 4 else flat
        return jnp.take_along_axis(array, index, axis=2, mode="promise_in_bounds")

    rows = row_floats(jax.tree.map(take, cache))
    # XLA:CPU copies the rows of a bare gather on one core, number by number. Fused into arithmetic the gather takes a
    # fifth of the time. This maximum changes no number, and the barrier keeps XLA from moving it elsewhere.
    rows = lax.optimization_barrier(jnp.maximum(rows, jnp.finfo(rows.dtype).min))
    return rows.reshape(B, slots.shape[1], -1, H)


def weights_of_reads(q: Float[Array, "B N H"], keys: Rows, slots: Int[Array, "B J W"]) -> Float[Array, "B N W"]:
    """The attention probabilities of `api.sparse_decode` on the slots that it reads, in float32; 0 for EMPTY."""
    (B, N, H), J = q.shape, slots.shape[1]
    picked, grouped = take_rows(keys, slots), q.reshape(B, J, N // J, H)
    scores = jnp.einsum("BJGH,BJWH->BJGW", grouped, picked, preferred_element_type=jnp.float32) * H**-0.5
    is_visible = (slots != EMPTY)[:, :, None, :]
    weights = jnp.where(is_visible, jax.nn.softmax(jnp.where(is_visible, scores, MASKED), axis=-1), 0)
    return weights.reshape(B, N, -1)
