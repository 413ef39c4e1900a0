"""Decode attention as a Pallas kernel for NVIDIA GPUs, through Triton: ranges plus a list, found through the plan.

One program reads the slots of one list, or of a part of it (split-K, as in Flash-Decoding), for all query heads that
the list serves, so that a key row is read once. The definition is `reference_attention.sparse_decode`; with no list and
recent_start = 0 it is `reference_attention.dense_decode`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Float, Int

from hshare_jax.kernels.reference_attention import EMPTY, MASKED
from hshare_jax.kernels.tiling import Tiles, attention_tiles
from hshare_jax.shapes import Lists, Source

LOG2_E = math.log2(math.e)  # the kernels use exp2, which the hardware has


def dense_decode(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    lengths: Int[Array, "B"],
    *,
    window: int | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "B N H"]:
    """Returns what `reference_attention.dense_decode` does; zeros for a row of length 0. Slots that are not read may be NaN."""
    B, K, S, _ = keys.shape
    nothing = jnp.full((1, 1, 1, 1), EMPTY, jnp.int32)
    return _decode(
        q, keys, values, nothing, jnp.zeros((B, 1, K), jnp.int32), jnp.int32(0), lengths, jnp.zeros_like(lengths),
        num_sinks=0, num_listed=0, num_slots=min(S, window or S), window=window, tiles=tiles, interpret=interpret,
    )  # fmt: skip


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
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "B N H"]:
    """Returns what `reference_attention.sparse_decode` does; zeros for a row of length 0. Slots that are not read may be NaN.

    Rows under `min_length` read everything in this same kernel, in other blocks than `dense_decode`: they equal it
    within rounding, not bit for bit as the reference does.
    """
    # A recent range from slot 0 on is everything; sinks and lists, which end where it begins, are then empty.
    start = jnp.where(lengths < min_length, 0, recent_start)
    return _decode(
        q, keys, values, lists, source, jnp.int32(layer), lengths, start,
        num_sinks=num_sinks, num_listed=lists.shape[-1], num_slots=num_sinks + lists.shape[-1] + max_recent,
        window=window, tiles=tiles, interpret=interpret,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("num_sinks", "num_listed", "num_slots", "window", "tiles", "interpret"))
def _decode(
    q: Array, keys: Array, values: Array, lists: Array, source: Array, layer: Array, lengths: Array, start: Array, *,
    num_sinks: int, num_listed: int, num_slots: int, window: int | None, tiles: Tiles | None, interpret: bool,
) -> Array:  # fmt: skip
    (B, N, H), J, dtype = q.shape, source.shape[2], q.dtype
    # A row whose cache is full goes on without its new token. A dot takes operands of one type, no shorter than 16.
    lengths, q = jnp.minimum(lengths, keys.shape[2]), q.astype(keys.dtype)
    width = max(16, pl.next_power_of_2(H))
    if tiles is None:
        tiles = attention_tiles(width, keys.dtype.itemsize, B * J, num_slots)
    kernel = functools.partial(
        _attend, num_sinks=num_sinks, num_listed=num_listed, window=window, tiles=tiles, width=width
    )
    parts = jax.ShapeDtypeStruct((B, N, tiles.splits, H), dtype if tiles.splits == 1 else jnp.float32)
    out, log_total = pl.pallas_call(
        kernel,
        grid=(tiles.splits, J, B),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 8,
        out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
        out_shape=[parts, jax.ShapeDtypeStruct((B, N, tiles.splits), jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret,
        name="decode_attention",
    )(q, keys, values, lists, source, layer.reshape(1), lengths, start)
    return out[:, :, 0] if tiles.splits == 1 else _merge(out, log_total, dtype, interpret)


def _attend(
    q_ref, keys_ref, values_ref, lists_ref, source_ref, layer_ref, lengths_ref, start_ref, out_ref, log_total_ref, *,
    num_sinks: int, num_listed: int, window: int | None, tiles: Tiles, width: int,
) -> None:  # fmt: skip
    split, j, b = (pl.program_id(axis) for axis in range(3))
    J, K, H, C = source_ref.shape[2], keys_ref.shape[1], keys_ref.shape[3], num_listed
    group_size = q_ref.shape[1] // J
    k = j // (J // K)
    length, start = lengths_ref[b], start_ref[b]
    first = 0 if window is None else jnp.maximum(length - window, 0)
    range_start = jnp.maximum(start, first)
    unit = source_ref[b, layer_ref[0], j]
    columns = jnp.arange(width, dtype=jnp.int32)[None, :]
    heads = jnp.arange(1 if group_size == 1 else max(16, pl.next_power_of_2(group_size)), dtype=jnp.int32)[:, None]
    is_query = (heads < group_size) & (columns < H)
    head = j * group_size + heads
    query = plgpu.load(q_ref.at[b, head, columns], mask=is_query, other=0)

    def find_slots(block: Array) -> tuple[Array, Array]:
        """Returns (slots, which of them are read) of a block of what the list reads: sinks, list, recent range."""
        place = block * tiles.block + jnp.arange(tiles.block, dtype=jnp.int32)
        slots = jnp.where(place < num_sinks, place, range_start + place - (num_sinks + C))
        is_read = jnp.where(place < num_sinks, slots < start, slots < length)
        if C > 0:
            is_listed = (place >= num_sinks) & (place < num_sinks + C)
            at = jnp.where(is_listed, place - num_sinks, 0)
            listed = plgpu.load(lists_ref.at[unit // J, b, unit % J, at], mask=is_listed, other=EMPTY)
            slots = jnp.where(is_listed, listed, slots)
            is_read = jnp.where(is_listed, (listed >= 0) & (listed < start), is_read)
        return slots, is_read & (slots >= first)

    def read_block(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        out, peak, total = carry
        slots, is_read = find_slots(block)
        row = jnp.where(is_read, slots, 0)[:, None]
        mask = is_read[:, None] & (columns < H)
        # Both before the first use, so that twice as much is under way.
        key = plgpu.load(keys_ref.at[b, k, row, columns], mask=mask, other=0)
        value = plgpu.load(values_ref.at[b, k, row, columns], mask=mask, other=0)
        scores = _scores(query, key) * (H**-0.5 * LOG2_E)
        scores = jnp.where(is_read[None, :], scores, MASKED)
        new_peak = jnp.maximum(peak, scores.max(axis=1))
        weights = jnp.where(is_read[None, :], jnp.exp2(scores - new_peak[:, None]), 0)
        shrink = jnp.exp2(peak - new_peak)
        out = out * shrink[:, None] + _weighted(weights, value)
        return out, new_peak, total * shrink + weights.sum(axis=1)

    num_blocks = pl.cdiv(num_sinks + C + jnp.maximum(length - range_start, 0), tiles.block)
    share = pl.cdiv(num_blocks, tiles.splits)
    rows = heads.shape[0]
    carry = (
        jnp.zeros((rows, width), jnp.float32),
        jnp.full((rows,), MASKED, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    last = jnp.minimum((split + 1) * share, num_blocks)
    out, peak, total = lax.fori_loop(split * share, last, read_block, carry)
    out = out / jnp.where(total > 0, total, 1)[:, None]
    plgpu.store(out_ref.at[b, head, split, columns], out.astype(out_ref.dtype), mask=is_query)
    log_total = jnp.where(total > 0, peak + jnp.log2(jnp.where(total > 0, total, 1)), MASKED)
    plgpu.store(log_total_ref.at[b, head[:, 0], split], log_total, mask=heads[:, 0] < group_size)


def _scores(query: Float[Array, "heads H"], key: Float[Array, "slots H"]) -> Float[Array, "heads slots"]:
    if query.shape[0] == 1:  # one query a key: no work for a tensor core
        return (query.astype(jnp.float32) * key.astype(jnp.float32)).sum(axis=1)[None, :]
    return plgpu.dot(query, key, trans_b=True, precision=_precision(key))


def _weighted(weights: Float[Array, "heads slots"], value: Float[Array, "slots H"]) -> Float[Array, "heads H"]:
    if weights.shape[0] == 1:
        return (weights.reshape(-1, 1) * value.astype(jnp.float32)).sum(axis=0)[None, :]
    return plgpu.dot(weights.astype(value.dtype), value, precision=_precision(value))


def _precision(operand: Array) -> lax.Precision | None:
    return lax.Precision.HIGHEST if operand.dtype == jnp.float32 else None


def _merge(out: Float[Array, "B N splits H"], log_total: Array, dtype: jnp.dtype, interpret: bool) -> Array:
    """Returns the attention [B, N, H] of all splits together."""
    B, N, splits, H = out.shape

    def merge(out_ref, log_total_ref, merged_ref) -> None:
        b, n = pl.program_id(0), pl.program_id(1)
        split, columns = jnp.arange(splits, dtype=jnp.int32), jnp.arange(pl.next_power_of_2(H), dtype=jnp.int32)
        log_totals = log_total_ref[b, n, split]
        weights = jnp.exp2(log_totals - log_totals.max(axis=0))
        at = out_ref.at[b, n, split[:, None], columns[None, :]]
        parts = plgpu.load(at, mask=jnp.broadcast_to(columns[None, :] < H, (splits, columns.size)), other=0)
        merged = (weights[:, None] * parts).sum(axis=0) / weights.sum(axis=0)
        plgpu.store(merged_ref.at[b, n, columns], merged.astype(dtype), mask=columns < H)

    return pl.pallas_call(
        merge,
        grid=(B, N),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=jax.ShapeDtypeStruct((B, N, H), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=1 if splits * H <= 1024 else 4, num_stages=1),
        interpret=interpret,
        name="merge_splits",
    )(out, log_total)
