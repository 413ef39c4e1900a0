"""Decode attention as a Pallas kernel for NVIDIA GPUs, through Triton: two ranges and a list, found through the plan.

One program reads the slots of one list, or a part (split-K, as in Flash-Decoding), for all query heads that the list
serves, so that each key row is read once. A second kernel merges the parts. Dense attention is the same kernel
with no list and recent_start = 0. The kernel that writes the result also adds the tail, so a tail is no further kernel.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, Int

from hshare_jax.kernels.int8_rows import Int8Rows, Rows
from hshare_jax.kernels.masked_softmax import LOG2_E, MASKED
from hshare_jax.kernels.reference_attention import split_decode
from hshare_jax.kernels.tail import MAX_FEATURE, Tail
from hshare_jax.kernels.tiling import Tiles, attention_tiles
from hshare_jax.shapes import EMPTY, Lists, Source

__all__ = ["dense_decode", "sparse_decode", "split_decode"]  # the last serves prompts alone: left to XLA


def dense_decode(
    q: Float[Array, "B N H"],
    keys: Rows,
    values: Rows,
    lengths: Int[Array, "B"],
    *,
    window: int | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "B N H"]:
    """`api.dense_decode` as a kernel. Slots that are not read may even be infinite or NaN.

    Args:
        q, keys, values, lengths, window: as `api.dense_decode` takes them.
        tiles: the layout of the kernel; None takes the choice of `tiling`.
        interpret: whether the kernel runs in Pallas' interpreter.
    """
    B, K, S, _ = keys.shape
    layout = _lay_out(keys, K, min(S, window or S), num_sinks=0, num_listed=0, window=window, tiles=tiles)
    nothing, source = jnp.full((1, 1, 1, 1), EMPTY, jnp.int32), jnp.zeros((B, 1, K), jnp.int32)
    return _decode(
        q, keys, values, nothing, source, jnp.int32(0), lengths, jnp.zeros_like(lengths), None,
        layout=layout, interpret=interpret,
    )  # fmt: skip


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
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "B N H"]:
    """`api.sparse_decode` as a kernel. Slots that are not read may even be infinite or NaN.

    Rows under `min_length` read everything in this same kernel, in other blocks than `dense_decode`. So they equal it
    within rounding and not bit for bit.

    Args:
        q to tail: as `api.sparse_decode` takes them.
        tiles: the layout of the kernel; None takes the choice of `tiling`.
        interpret: whether the kernel runs in Pallas' interpreter.
    """
    # A recent range that begins at slot 0 holds everything. Sinks and list end where it begins, so they are then empty.
    start = jnp.where(lengths < min_length, 0, recent_start)
    _, _, J, C = lists.shape
    max_slots = num_sinks + C + max_recent
    layout = _lay_out(keys, J, max_slots, num_sinks=num_sinks, num_listed=C, window=window, tiles=tiles)
    return _decode(
        q, keys, values, lists, source, jnp.int32(layer), lengths, start, tail, layout=layout, interpret=interpret
    )


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The static sizes of the kernel."""

    num_sinks: int
    num_listed: int  # C, or 0 without lists
    window: int | None
    tiles: Tiles
    width: int  # H, rounded up to a power of two that a dot takes


def _lay_out(
    keys: Rows, num_lists: int, max_slots: int, *, num_sinks: int, num_listed: int, window: int | None,
    tiles: Tiles | None,
) -> _Layout:  # fmt: skip
    """The sizes for a layer's cache and its lists, each of which reads at most `max_slots` slots."""
    B, _, _, H = keys.shape
    width = max(16, pl.next_power_of_2(H))  # no side of a dot is shorter than 16
    tiles = tiles or attention_tiles(
        width, keys.dtype.itemsize, B * num_lists, max_slots, in_registers=in_registers(keys)
    )
    return _Layout(num_sinks, num_listed, window, tiles, width)


def in_registers(keys: Rows) -> bool:
    """Whether a cache is multiplied from registers: codes that become float32 are, and registers hold few of them."""
    return isinstance(keys, Int8Rows) and keys.dtype == jnp.float32


@functools.partial(jax.jit, static_argnames=("layout", "interpret"))
def _decode(
    q: Array, keys: Rows, values: Rows, lists: Array, source: Array, layer: Array, lengths: Array, start: Array,
    tail: Tail | None, *, layout: _Layout, interpret: bool,
) -> Array:  # fmt: skip
    """Attention [B, N, H] by the kernels."""
    (B, N, H), J, dtype, tiles = q.shape, source.shape[2], q.dtype, layout.tiles
    # A row whose cache is full goes on without its new token. Both operands of a dot have one type.
    lengths, q = jnp.minimum(lengths, keys.shape[2]), q.astype(keys.dtype)
    tails = None if tail is None else (tail.keys, tail.values, tail.terms)
    inputs = (q, keys, values, lists, source, layer.reshape(1), lengths, start, tails)
    parts = jax.ShapeDtypeStruct((B, N, tiles.splits, H), dtype if tiles.splits == 1 else jnp.float32)
    per_head = jax.ShapeDtypeStruct((B, N, tiles.splits), jnp.float32)
    per_list = jax.ShapeDtypeStruct((B, J, tiles.splits), jnp.int32)
    outputs = (parts, per_head, None if tails is None or tiles.splits == 1 else (per_head, per_list))
    out, log_total, tally = pl.pallas_call(
        functools.partial(_attend, layout=layout),
        grid=(tiles.splits, J, B),
        in_specs=in_place(inputs),
        out_specs=in_place(outputs),
        out_shape=outputs,
        compiler_params=plgpu.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret,
        name="decode_attention",
    )(*inputs)
    if tiles.splits == 1:
        return out[:, :, 0]
    for_tail = None if tally is None else (tally, lengths, q, tails)
    return _merge(out, log_total, for_tail, window=layout.window, dtype=dtype, interpret=interpret)


def in_place(arrays: Any) -> Any:
    """Specifications by which a kernel reads or writes its arrays where they lie."""
    return jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), arrays)


def _attend(
    q_ref,  # [B, N, H]
    keys_ref,  # [B, K, S, H], or Int8Rows of such references
    values_ref,  # as the keys
    lists_ref,  # [L, B, J, C]
    source_ref,  # [B, L, J]
    layer_ref,  # [1]
    lengths_ref,  # [B]
    start_ref,  # [B], the recent range's first slot
    tail_refs,  # the keys, values and terms of a Tail; None without one
    out_ref,  # [B, N, splits, H]
    log_total_ref,  # [B, N, splits], log2 of the sum that the softmax divides by
    tally_refs,  # sum of scores [B, N, splits] and number of slots [B, J, splits]; None unless a merge adds a tail
    *,
    layout: _Layout,
) -> None:
    """One program: one split of the slots of list j of row b, for all heads that the list serves."""
    split, j, b = (pl.program_id(axis) for axis in range(3))
    J, K, H, tiles = source_ref.shape[2], keys_ref.shape[1], keys_ref.shape[3], layout.tiles
    group_size = q_ref.shape[1] // J
    k = j // (J // K)
    bounds = _read_bounds(lengths_ref[b], start_ref[b], layout.window)
    unit = source_ref[b, layer_ref[0], j]
    columns = jnp.arange(layout.width, dtype=jnp.int32)[None, :]
    heads = jnp.arange(1 if group_size == 1 else max(16, pl.next_power_of_2(group_size)), dtype=jnp.int32)[:, None]
    is_head = heads < group_size
    is_query = is_head & (columns < H)
    head = j * group_size + heads
    query = plgpu.load(q_ref.at[b, head, columns], mask=is_query, other=0)

    def load_listed(place: Array, mask: Array) -> Array:
        return plgpu.load(lists_ref.at[unit // J, b, unit % J, place], mask=mask, other=EMPTY)

    def read_block(block: Array, carry: _Softmax) -> _Softmax:
        slots, is_read = _find_slots(block, bounds, load_listed, layout)
        slots = jnp.where(is_read, slots, 0)
        # Both loads come before the first use, so that twice as much is under way.
        key, key_scale = load_rows(keys_ref, (b, k), slots, is_read, columns)
        value, value_scale = load_rows(values_ref, (b, k), slots, is_read, columns)
        scores = scores_of(query, key, key_scale) * (H**-0.5 * LOG2_E)
        return _add_block(carry, scores, value, value_scale, is_read)

    num_places = layout.num_sinks + layout.num_listed + jnp.maximum(bounds.length - bounds.recent_start, 0)
    num_blocks = pl.cdiv(num_places, tiles.block)
    share = pl.cdiv(num_blocks, tiles.splits)
    nothing = _no_softmax(heads.shape[0], layout.width, with_tally=tail_refs is not None)
    last = jnp.minimum((split + 1) * share, num_blocks)
    out, peak, total, tally = lax.fori_loop(split * share, last, read_block, nothing)
    out = out / jnp.where(total > 0, total, 1)[:, None]
    log_total = jnp.where(total > 0, peak + jnp.log2(jnp.where(total > 0, total, 1)), MASKED)
    if tally is not None:
        if tally_refs is None:
            tail = _load_tail(tail_refs, b, head, is_head, columns)
            num_seen, tally = _num_seen(bounds.length, layout.window), _Tally(tally.score_sum[:, None], tally.num_read)
            out = _add_tail(out, log_total[:, None], tally, num_seen, query.astype(jnp.float32) * H**-0.5, tail)
        else:
            score_sum_ref, num_read_ref = tally_refs
            plgpu.store(score_sum_ref.at[b, head[:, 0], split], tally.score_sum, mask=is_head[:, 0])
            num_read_ref[b, j, split] = tally.num_read
    plgpu.store(out_ref.at[b, head, split, columns], out.astype(out_ref.dtype), mask=is_query)
    plgpu.store(log_total_ref.at[b, head[:, 0], split], log_total, mask=is_head[:, 0])


def load_rows(
    rows_ref: Any, head: tuple[Array, Array], slots: Array, is_read: Array | None, columns: Array
) -> tuple[Array, Array | None]:
    """The numbers [slots, width] of cached rows, and their scales [1, slots] if they have 8 bits.

    Codes are given in the dtype that they stand for, which holds them exactly. Scores and weights are multiplied by the
    scales, and not the rows, because there are fewer of them.

    Args:
        rows_ref: keys or values, as references.
        head: the row of the batch, and the kv head.
        slots: the rows' slots.
        is_read: those of them that are loaded; None loads all, and needs rows as wide as `columns`.
        columns: [1, width].
    """
    mask = other = None
    if is_read is not None:
        mask, other = is_read[:, None] & (columns < rows_ref.shape[3]), 0
    at = *head, slots[:, None], columns
    if not isinstance(rows_ref, Int8Rows):
        return plgpu.load(rows_ref.at[at], mask=mask, other=other), None
    codes = plgpu.load(rows_ref.qvalue.at[at], mask=mask, other=other)
    scale = plgpu.load(rows_ref.scale.at[*head, slots], mask=is_read, other=other)
    return codes.astype(rows_ref.dtype), scale[None, :]


class _Bounds(NamedTuple):
    """The slots between which a program reads, as scalars."""

    length: Array  # nothing is read at or beyond it
    list_end: Array  # sinks and list are read before it
    first: Array | int  # nothing is read before it: the window's first slot
    recent_start: Array  # the recent range is read from here on


def _read_bounds(length: Array, start: Array, window: int | None) -> _Bounds:
    first = 0 if window is None else jnp.maximum(length - window, 0)
    return _Bounds(length, start, first, jnp.maximum(start, first))


def _num_seen(length: Array, window: int | None) -> Array:
    return length if window is None else jnp.minimum(length, window)


def _find_slots(
    block: Array, bounds: _Bounds, load_listed: Callable[[Array, Array], Array], layout: _Layout
) -> tuple[Array, Array]:
    """The slots at the places of a block, and whether each slot is read.

    A program's places are the sinks, then the places of the list, then the recent range.
    """
    num_sinks, C = layout.num_sinks, layout.num_listed
    place = block * layout.tiles.block + jnp.arange(layout.tiles.block, dtype=jnp.int32)
    slots = jnp.where(place < num_sinks, place, bounds.recent_start + place - (num_sinks + C))
    is_read = jnp.where(place < num_sinks, slots < bounds.list_end, slots < bounds.length)
    if C > 0:
        is_listed = (place >= num_sinks) & (place < num_sinks + C)
        listed = load_listed(jnp.where(is_listed, place - num_sinks, 0), is_listed)
        slots = jnp.where(is_listed, listed, slots)
        is_read = jnp.where(is_listed, (listed >= 0) & (listed < bounds.list_end), is_read)
    return slots, is_read & (slots >= bounds.first)


class _Tally(NamedTuple):
    """What a tail must know of the slots that were read."""

    score_sum: Array  # [heads], the sum of their scores, in powers of two
    num_read: Array  # [], how many they are


class _Softmax(NamedTuple):
    """An online softmax (arXiv 1805.02867) over the slots seen so far, for each head."""

    out: Array  # [heads, width], the weighted sum of the values
    peak: Array  # [heads], the highest score
    total: Array  # [heads], the sum of the weights
    tally: _Tally | None  # None without a tail


def _no_softmax(heads: int, width: int, *, with_tally: bool) -> _Softmax:
    return _Softmax(
        jnp.zeros((heads, width), jnp.float32),
        jnp.full((heads,), MASKED, jnp.float32),
        jnp.zeros((heads,), jnp.float32),
        _Tally(jnp.zeros((heads,), jnp.float32), jnp.int32(0)) if with_tally else None,
    )


def _add_block(
    softmax: _Softmax, scores: Float[Array, "heads slots"], value: Float[Array, "slots H"],
    value_scale: Float[Array, "1 slots"] | None, is_read: Array,
) -> _Softmax:  # fmt: skip
    """The softmax with one more block of slots; scores are in powers of two, values are divided by their scale."""
    out, peak, total, tally = softmax
    if tally is not None:
        score_sum = tally.score_sum + jnp.where(is_read[None, :], scores, 0).sum(axis=1)
        tally = _Tally(score_sum, tally.num_read + is_read.astype(jnp.int32).sum())
    scores = jnp.where(is_read[None, :], scores, MASKED)
    new_peak = jnp.maximum(peak, scores.max(axis=1))
    weights = jnp.where(is_read[None, :], jnp.exp2(scores - new_peak[:, None]), 0)
    shrink = jnp.exp2(peak - new_peak)
    out = out * shrink[:, None] + weighted(weights, value, value_scale)
    return _Softmax(out, new_peak, total * shrink + weights.sum(axis=1), tally)


def scores_of(
    query: Float[Array, "heads H"], key: Float[Array, "slots H"], key_scale: Float[Array, "1 slots"] | None
) -> Float[Array, "heads slots"]:
    """The products q . k of all queries and keys; keys may be divided by a scale."""
    if query.shape[0] == 1:  # one query per key is no work for a tensor core
        scores = (query.astype(jnp.float32) * key.astype(jnp.float32)).sum(axis=1)[None, :]
    else:
        scores = plgpu.dot(query, key, trans_b=True, precision=precision_of(key))
    return scores if key_scale is None else scores * key_scale


def weighted(
    weights: Float[Array, "heads slots"], value: Float[Array, "slots H"], value_scale: Float[Array, "1 slots"] | None
) -> Float[Array, "heads H"]:
    """The sum of the values by weight; values may be divided by a scale."""
    largest = None
    if value_scale is not None and value.dtype == jnp.float16:
        # Float16 does not hold small numbers, so weights are multiplied by shares of the largest scale.
        largest = value_scale.max()
        value_scale = value_scale / jnp.where(largest > 0, largest, 1)
    weights = weights if value_scale is None else weights * value_scale
    if weights.shape[0] == 1:
        read = (weights.reshape(-1, 1) * value.astype(jnp.float32)).sum(axis=0)[None, :]
    else:
        read = plgpu.dot(weights.astype(value.dtype), value, precision=precision_of(value))
    return read if largest is None else read * largest


def precision_of(operand: Array) -> lax.Precision | None:
    """The precision of a dot: float32 is not rounded to TensorFloat-32."""
    return lax.Precision.HIGHEST if operand.dtype == jnp.float32 else None


class _LoadedTail(NamedTuple):
    """The tails of a program's heads, in float32. Where a program has one head, its arrays have no axis of heads."""

    keys: list[Array]  # of each virtual token [heads, width]
    values: list[Array]  # of each virtual token [heads, width]
    terms: list[Array]  # each [heads, 1]


def _load_tail(tail_refs: tuple, b: Array, head: Array, is_head: Array, columns: Array) -> _LoadedTail:
    """The tails of the heads `head` [heads, 1] or [1] of row b."""
    keys_ref, values_ref, terms_ref = tail_refs
    _, _, num_tokens, H = keys_ref.shape

    def load(ref, i: int) -> Array:
        return plgpu.load(ref.at[b, head, i, columns], mask=is_head & (columns < H), other=0).astype(jnp.float32)

    keys, values = ([load(ref, i) for i in range(num_tokens)] for ref in (keys_ref, values_ref))
    terms = [plgpu.load(terms_ref.at[b, head, i], mask=is_head, other=0) for i in range(terms_ref.shape[2])]
    return _LoadedTail(keys, values, terms)


def _add_tail(out: Array, log_total: Array, tally: _Tally, num_seen: Array, query: Array, tail: _LoadedTail) -> Array:
    """`tail.add_tail` for the heads of a program. Numbers of each head are [heads, 1], or [1] or [] if it has one head.

    Args:
        out: the attention [heads, width] or [width] over the slots that were read.
        log_total: log2 of the sum that the softmax divided by.
        tally: the tally of the slots that were read.
        num_seen: how many slots the row sees.
        query: the queries in float32, scaled by 1 / sqrt(H).
        tail: the tails of the heads.
    """
    constant, of_total, of_mean, low, high, follow, *shifts = tail.terms
    scores = [(query * key).sum(axis=-1, keepdims=True) for key in tail.keys]
    total, mean = log_total / LOG2_E, tally.score_sum / (LOG2_E * jnp.maximum(tally.num_read, 1))
    num_unread = num_seen - tally.num_read
    weight = jnp.clip(constant + scores[0] + of_total * total + of_mean * mean, low, high)
    weight += jnp.log(jnp.maximum(num_unread, 1).astype(jnp.float32))
    share = jnp.where(num_unread > 0, jax.nn.sigmoid(weight - total), 0)
    value = tail.values[0] + follow * out
    for score, shift, direction in zip(scores[1:], shifts, tail.values[1:], strict=True):
        value += jnp.clip(score - shift, -MAX_FEATURE, MAX_FEATURE) * direction
    return out + share * (value - out)


def _merge(
    out: Float[Array, "B N splits H"], log_total: Array, for_tail: tuple | None, *, window: int | None,
    dtype: jnp.dtype, interpret: bool,
) -> Array:  # fmt: skip
    """The attention [B, N, H] of all splits together.

    Args:
        out, log_total: the splits' attention, and log2 of the sum that each head's softmax divided by.
        for_tail: what only a tail needs: the splits' tallies, the lengths, the queries and the tail's arrays, or None.
        window: the layer's sliding window.
        dtype: of the result.
        interpret: whether the kernel runs in Pallas' interpreter.
    """
    B, N, splits, H = out.shape

    def merge(out_ref, log_total_ref, for_tail, merged_ref) -> None:
        b, n = pl.program_id(0), pl.program_id(1)
        split, columns = jnp.arange(splits, dtype=jnp.int32), jnp.arange(pl.next_power_of_2(H), dtype=jnp.int32)
        log_totals = log_total_ref[b, n, split]
        weights = jnp.exp2(log_totals - log_totals.max(axis=0))
        at = out_ref.at[b, n, split[:, None], columns[None, :]]
        parts = plgpu.load(at, mask=jnp.broadcast_to(columns[None, :] < H, (splits, columns.size)), other=0)
        merged = (weights[:, None] * parts).sum(axis=0) / weights.sum(axis=0)
        if for_tail is not None:
            (score_sum_ref, num_read_ref), lengths_ref, q_ref, tail_refs = for_tail
            j = n // (N // num_read_ref.shape[1])
            tally = _Tally(score_sum_ref[b, n, split].sum(axis=0), num_read_ref[b, j, split].sum(axis=0))
            log_total = log_totals.max(axis=0) + jnp.log2(weights.sum(axis=0))
            query = plgpu.load(q_ref.at[b, n, columns], mask=columns < H, other=0).astype(jnp.float32) * H**-0.5
            head = jnp.full((1,), n)
            tail = _load_tail(tail_refs, b, head, head < N, columns)
            merged = _add_tail(merged, log_total, tally, _num_seen(lengths_ref[b], window), query, tail)
        plgpu.store(merged_ref.at[b, n, columns], merged.astype(dtype), mask=columns < H)

    inputs, output = (out, log_total, for_tail), jax.ShapeDtypeStruct((B, N, H), dtype)
    return pl.pallas_call(
        merge,
        grid=(B, N),
        in_specs=in_place(inputs),
        out_specs=in_place(output),
        out_shape=output,
        compiler_params=plgpu.CompilerParams(num_warps=1 if splits * H <= 1024 else 4, num_stages=1),
        interpret=interpret,
        name="merge_splits",
    )(*inputs)
