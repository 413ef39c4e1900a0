"""Decode attention in plain jnp: the definition of the attention operations of `api`, on every machine.

Keys and values are [B, K, S, H]: slot s of a row holds its token at position s. The softmax runs in float32 for every
dtype.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from hshare_jax.kernels.int8_rows import Rows, row_floats
from hshare_jax.kernels.labels import score_keys
from hshare_jax.kernels.masked_softmax import MASKED
from hshare_jax.kernels.reads import mark_listed, slots_to_read, take_rows
from hshare_jax.kernels.tail import Part, Tail, add_tail
from hshare_jax.shapes import EMPTY, Lists, Source


def dense_decode(
    q: Float[Array, "B N H"],
    keys: Rows,
    values: Rows,
    lengths: Int[Array, "B"],
    *,
    window: int | None = None,
) -> Float[Array, "B N H"]:
    """The definition of `api.dense_decode`."""
    B, K, S, H = keys.shape
    slots = jnp.arange(S, dtype=jnp.int32)[None, :]
    is_visible = slots < lengths[:, None]
    if window is not None:
        is_visible &= slots >= lengths[:, None] - window
    is_visible = jnp.broadcast_to(is_visible[:, None, :], (B, K, S))
    return _attend_one_query(q, row_floats(keys), row_floats(values), is_visible)


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
    """The definition of `api.sparse_decode`. Rows under `min_length` are computed by `dense_decode` itself."""

    def sparse() -> Array:
        J, row, unit = source.shape[2], jnp.arange(q.shape[0])[:, None], source[:, layer]
        listed = lists[unit // J, row, unit % J]  # [B, J, C]
        slots = slots_to_read(
            listed, lengths, recent_start, num_sinks=num_sinks, max_recent=max_recent, window=window
        )  # [B, J, W]
        picked_keys, picked_values = (take_rows(cache, slots) for cache in (keys, values))
        num_seen = jnp.minimum(lengths, min(keys.shape[2], window or keys.shape[2]))
        return _attend_one_query(q, picked_keys, picked_values, slots != EMPTY, tail, num_seen)

    if min_length <= 0:
        return sparse()
    is_dense = lengths < min_length
    # Where all rows are sparse nothing dense is computed, and where all rows are dense nothing sparse.
    dense_out = lax.cond(
        is_dense.any(), lambda: dense_decode(q, keys, values, lengths, window=window), lambda: jnp.zeros_like(q)
    )
    sparse_out = lax.cond(is_dense.all(), lambda: jnp.zeros_like(q), sparse)
    return jnp.where(is_dense[:, None, None], dense_out, sparse_out)


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
    """The definition of `api.split_decode`. Exponentials are computed and values are read once for both parts.

    A part whose scores all lie 87 nats below the other's weighs nothing.
    """
    (B, N, H), (_, K, S, _), J = q.shape, keys.shape, listed.shape[1]
    slots = jnp.arange(S, dtype=jnp.int32)[None, :]
    is_seen = slots < lengths[:, None]
    if window is not None:
        is_seen &= slots >= lengths[:, None] - window
    is_read = mark_listed(listed, recent_start, num_sinks, S)
    values = row_floats(values)
    masks = jnp.repeat(is_seen[:, None, None] & jnp.stack([is_read, ~is_read], axis=1), N // J, axis=2)  # [B, 2, N, S]
    scores = score_keys(q, keys)
    seen_scores = jnp.where(is_seen[:, None], scores, MASKED)
    peak = seen_scores.max(axis=-1, keepdims=True)
    weights = jnp.where(masks, jnp.exp(seen_scores - peak)[:, None], 0)
    totals, counts = weights.sum(axis=-1), masks.sum(axis=-1)  # [B, 2, N]
    means = jnp.where(masks, scores[:, None], 0).sum(axis=-1) / jnp.maximum(counts, 1)
    weights = jnp.moveaxis(weights.reshape(B, 2, K, N // K, S), 1, 2).reshape(B, K, -1, S).astype(values.dtype)
    sums = jnp.einsum("BKGS,BKSH->BKGH", weights, values, preferred_element_type=jnp.float32)
    sums = jnp.moveaxis(sums.reshape(B, K, 2, N // K, H), 2, 1).reshape(B, 2, N, H)
    is_empty = totals == 0
    totals = jnp.where(is_empty, 1, totals)
    log_totals = jnp.where(is_empty, MASKED, peak[:, None, :, 0] + jnp.log(totals))
    parts = Part(sums / totals[..., None], log_totals, means, counts)
    read, rest = (jax.tree.map(lambda array, i=i: array[:, i], parts) for i in range(2))
    return read, rest


def _attend_one_query(
    q: Array, keys: Array, values: Array, is_visible: Array, tail: Tail | None = None, num_seen: Array | None = None
) -> Array:
    """Attention [B, N, H] of q [B, N, H] over keys and values [B, J, W, H] where is_visible [B, J, W].

    With a tail for the rest of the `num_seen` [B] slots that each row sees.
    """
    B, N, H = q.shape
    J = keys.shape[1]
    grouped = q.reshape(B, J, N // J, H)
    # The keys are the left operand and the few queries of a group the right one, so that XLA:CPU streams the keys. The
    # barrier keeps XLA from swapping the operands to save the transposition. The transposition lays the weights along W
    # for the second product.
    scores = lax.dot_general(keys, grouped, (((3,), (3,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
    scores = lax.optimization_barrier(scores)
    is_visible = is_visible[:, :, None, :]
    scores = jnp.where(is_visible, scores.swapaxes(2, 3) * H**-0.5, MASKED)  # [B, J, G, W]
    peak = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    total = weights.sum(axis=-1)
    read = jnp.einsum("BJGW,BJWH->BJGH", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    out = jnp.where(peak > MASKED, read / total[..., None], 0)  # no visible slot: zeros
    if tail is not None and num_seen is not None:
        num_read = is_visible.sum(axis=-1)  # [B, J, 1]
        mean = jnp.where(is_visible, scores, 0).sum(axis=-1) / jnp.maximum(num_read, 1)
        num_unread = jnp.broadcast_to(num_seen[:, None, None] - num_read, mean.shape)
        log_total, mean, num_unread = (x.reshape(B, N) for x in (peak[..., 0] + jnp.log(total), mean, num_unread))
        out = add_tail(out.reshape(B, N, H), log_total, mean, num_unread, q, tail)
    return out.reshape(B, N, H).astype(q.dtype)
