"""Attention over a cache in plain jnp: the definition that every kernel equals, and the path that runs on CPU.

Keys and values are [B, K, S, H]: slot s of a row holds its token at position s. Softmax runs in float32 whatever the
dtype.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from hshare_jax.shapes import EMPTY, Lists, Source

MASKED = -1e30  # finite, so that a row with nothing to attend to yields numbers, not NaN
PREFILL_BLOCK = 256  # key slots per step of prefill attention; cache capacities are multiples of it


def dense_decode(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    lengths: Int[Array, "B"],
    *,
    window: int | None = None,
) -> Float[Array, "B N H"]:
    """Returns attention of one query per head over slots [0, length), or over the last `window` of them.

    The query's own key is the last of the `lengths` slots. Slots at and beyond a row's length may hold anything but
    NaN.
    """
    B, K, S, H = keys.shape
    slots = jnp.arange(S, dtype=jnp.int32)[None, :]
    is_visible = slots < lengths[:, None]
    if window is not None:
        is_visible &= slots >= lengths[:, None] - window
    return _attend_one_query(q, keys, values, jnp.broadcast_to(is_visible[:, None, :], (B, K, S)))


def sparse_decode(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
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
) -> Float[Array, "B N H"]:
    """Returns attention of one query per head over its list and two ranges, each slot read once.

    Head n reads list j = n * J // N, found through the plan: `lists[f // J, b, f % J]` with f = source[b, layer, j]. It
    attends to [0, num_sinks), the listed tokens and [recent_start, length).

        # num_sinks 1, list [2, 5, EMPTY], recent_start 6, length 8:  slots 0 | 2 5 | 6 7

    Args:
        q: one query per head; its own key is the last of the `lengths` slots.
        keys, values: the cache of one layer.
        lists: token positions in [num_sinks, recent_start), ascending, padded with EMPTY, of all layers.
        source: the flat id (layer * J + list) of the list that each list reads.
        layer: whose attention this is.
        lengths: cached tokens of each row, the current one included.
        recent_start: the first slot of each row's recent range.
        max_recent: a static bound on length - recent_start.
        window: the layer's sliding window; whatever lies outside is dropped.
        min_length: rows shorter than this read everything, by the very operations of `dense_decode`.
    """
    if min_length > 0:
        is_dense = lengths < min_length

        def dense() -> Array:
            return dense_decode(q, keys, values, lengths, window=window)

        def sparse() -> Array:
            return sparse_decode(
                q, keys, values, lists, source, layer, lengths, recent_start,
                num_sinks=num_sinks, max_recent=max_recent, window=window,
            )  # fmt: skip

        dense_out = lax.cond(is_dense.any(), dense, lambda: jnp.zeros_like(q))
        sparse_out = lax.cond(is_dense.all(), lambda: jnp.zeros_like(q), sparse)
        return jnp.where(is_dense[:, None, None], dense_out, sparse_out)
    B, K, S, H = keys.shape
    J = source.shape[2]
    unit, row = source[:, layer], jnp.arange(B)[:, None]
    listed = lists[unit // J, row, unit % J]  # [B, J, C]
    slots = slots_to_read(
        listed, lengths, recent_start, num_sinks=num_sinks, max_recent=max_recent, window=window
    )  # [B, J, W]
    picked_keys, picked_values = (_take_rows(cache, slots) for cache in (keys, values))
    return _attend_one_query(q, picked_keys, picked_values, slots != EMPTY)


def slots_to_read(
    listed: Int[Array, "B J C"],
    lengths: Int[Array, "B"],
    recent_start: Int[Array, "B"],
    *,
    num_sinks: int,
    max_recent: int,
    window: int | None,
) -> Int[Array, "B J W"]:
    """Returns the slots that `sparse_decode` reads, each once, padded with EMPTY; arguments are its own."""
    B, J, _ = listed.shape
    recent = recent_start[:, None] + jnp.arange(max_recent, dtype=jnp.int32)[None, :]
    recent = jnp.where(recent < lengths[:, None], recent, EMPTY)
    sinks = jnp.arange(num_sinks, dtype=jnp.int32)[None, :]
    # A row shorter than its sinks and recent tokens has them overlap; the recent range then owns the slot.
    sinks = jnp.where(sinks < recent_start[:, None], sinks, EMPTY)
    ranges = jnp.concatenate([sinks, recent], axis=1)
    slots = jnp.concatenate([jnp.broadcast_to(ranges[:, None, :], (B, J, ranges.shape[1])), listed], axis=2)
    return slots if window is None else jnp.where(slots >= (lengths - window)[:, None, None], slots, EMPTY)


def weights_of_reads(
    q: Float[Array, "B N H"], keys: Float[Array, "B K S H"], slots: Int[Array, "B J W"]
) -> Float[Array, "B N W"]:
    """Returns the float32 attention probabilities of `sparse_decode` on the slots that it reads; 0 for EMPTY."""
    (B, N, H), J = q.shape, slots.shape[1]
    picked, grouped = _take_rows(keys, slots), q.reshape(B, J, N // J, H)
    scores = jnp.einsum("BJGH,BJWH->BJGW", grouped, picked, preferred_element_type=jnp.float32) * H**-0.5
    is_visible = (slots != EMPTY)[:, :, None, :]
    weights = jnp.where(is_visible, jax.nn.softmax(jnp.where(is_visible, scores, MASKED), axis=-1), 0)
    return weights.reshape(B, N, -1)


def _take_rows(cache: Float[Array, "B K S H"], slots: Int[Array, "B J W"]) -> Float[Array, "B J W H"]:
    """Returns the cached rows of each list's slots; the first for EMPTY."""
    B, K, _, H = cache.shape
    # Lists of one kv head are gathered together: [B, K, (J // K) * W].
    flat = jnp.maximum(slots, 0).reshape(B, K, -1, 1)
    rows = jnp.take_along_axis(cache, flat, axis=2, mode="promise_in_bounds")
    # XLA:CPU copies the rows of a bare gather on one core, number by number. Fused into arithmetic, here one that
    # changes no number, it takes a fifth of the time; the barrier keeps it from being moved elsewhere.
    rows = lax.optimization_barrier(jnp.maximum(rows, jnp.finfo(rows.dtype).min))
    return rows.reshape(B, slots.shape[1], -1, H)


def _attend_one_query(q: Array, keys: Array, values: Array, is_visible: Array) -> Array:
    """Returns attention [B, N, H] of q [B, N, H] over keys and values [B, J, W, H] where is_visible [B, J, W]."""
    B, N, H = q.shape
    J = keys.shape[1]
    grouped = q.reshape(B, J, N // J, H)
    # Keys on the left, the few queries of a group on the right: so XLA:CPU streams the keys. The barrier keeps it from
    # swapping the two to save the transposition, after which the weights lie along W for the second product.
    scores = lax.dot_general(keys, grouped, (((3,), (3,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
    scores = lax.optimization_barrier(scores)
    scores = jnp.where(is_visible[:, :, None, :], scores.swapaxes(2, 3) * H**-0.5, MASKED)  # [B, J, G, W]
    peak = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    read = jnp.einsum("BJGW,BJWH->BJGH", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    out = jnp.where(peak > MASKED, read / weights.sum(axis=-1)[..., None], 0)  # what reads nothing yields zeros
    return out.reshape(B, N, H).astype(q.dtype)


def prefill_attention(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    starts: Int[Array, "B"],
    *,
    window: int | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Returns (causal attention of T new tokens per row over the cache, the log of what each softmax divides by).

    Token t of row b sits at position starts[b] + t and sees slots up to its own; the cache holds their keys and values
    already. Scores exist for one block of slots at a time (online softmax, arXiv 1805.02867), and the blocks beyond the
    longest row are never visited, so the work follows the length and not the capacity.
    """
    B, T, N, H = q.shape
    K, S = keys.shape[1:3]
    G = N // K
    block = min(PREFILL_BLOCK, S)
    if S % block:
        raise ValueError(f"the cache holds S={S} slots; it must be a multiple of {block} (init_state rounds up)")
    grouped = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H) * H**-0.5
    positions = jnp.tile(starts[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :], (1, G))[
        :, None, :, None
    ]  # [B, 1, GT, 1]

    def visit(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, peak, total = carry
        slots = (index * block + jnp.arange(block, dtype=jnp.int32))[None, None, None, :]
        block_keys = lax.dynamic_slice_in_dim(keys, index * block, block, axis=2)
        block_values = lax.dynamic_slice_in_dim(values, index * block, block, axis=2)
        scores = jnp.einsum("BKQH,BKSH->BKQS", grouped, block_keys, preferred_element_type=jnp.float32)
        is_visible = slots <= positions
        if window is not None:
            is_visible &= slots > positions - window
        scores = jnp.where(is_visible, scores, MASKED)
        new_peak = jnp.maximum(peak, scores.max(axis=-1))
        # Under a window a query's first blocks may be all masked; its weights there are wiped when a real peak arrives.
        weights = jnp.exp(scores - new_peak[..., None])
        shrink = jnp.exp(peak - new_peak)
        read = jnp.einsum(
            "BKQS,BKSH->BKQH", weights.astype(values.dtype), block_values, preferred_element_type=jnp.float32
        )
        return out * shrink[..., None] + read, new_peak, total * shrink + weights.sum(axis=-1)

    first = 0 if window is None else jnp.maximum(starts.min() - window + 1, 0) // block
    last = jnp.minimum((starts.max() + T + block - 1) // block, S // block)
    carry = (
        jnp.zeros((B, K, G * T, H), jnp.float32),
        jnp.full((B, K, G * T), MASKED, jnp.float32),
        jnp.zeros((B, K, G * T), jnp.float32),
    )
    out, peak, total = lax.fori_loop(first, last, visit, carry)
    out = (out / total[..., None]).reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4)
    return out.reshape(B, T, N, H).astype(q.dtype), (peak + jnp.log(total)).reshape(B, N, T)


def received_attention(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B K S H"],
    starts: Int[Array, "B"],
    is_token: Bool[Array, "B T"],
    log_total: Float[Array, "B N T"],
    *,
    window: int | None = None,
) -> Float[Array, "B N S"]:
    """Returns the attention probabilities that each slot receives from these queries of a prefill, summed over them.

    Arguments are those of `prefill_attention`, with what is padding told apart, and what it returns beside the
    attention. As there, scores exist for one block of slots at a time.
    """
    (B, T, N, H), (K, S) = q.shape, keys.shape[1:3]
    block = min(PREFILL_BLOCK, S)
    grouped = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4) * H**-0.5  # [B, K, G, T, H]
    positions = (starts[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :])[:, None, None, :, None]
    log_total = log_total.reshape(B, K, N // K, T, 1)

    def add_weights(index: Array, received: Array) -> Array:
        slots = (index * block + jnp.arange(block, dtype=jnp.int32))[None, None, None, None, :]
        block_keys = lax.dynamic_slice_in_dim(keys, index * block, block, axis=2)
        scores = jnp.einsum("BKGTH,BKSH->BKGTS", grouped, block_keys, preferred_element_type=jnp.float32)
        is_counted = (slots <= positions) & is_token[:, None, None, :, None]
        if window is not None:
            is_counted &= slots > positions - window
        weights = jnp.where(is_counted, jnp.exp(scores - log_total), 0).sum(axis=3)
        return lax.dynamic_update_slice_in_dim(received, weights.reshape(B, N, block), index * block, axis=2)

    first = 0 if window is None else jnp.maximum(starts.min() - window + 1, 0) // block
    last = jnp.minimum((starts.max() + T + block - 1) // block, S // block)
    return lax.fori_loop(first, last, add_weights, jnp.zeros((B, N, S), jnp.float32))
