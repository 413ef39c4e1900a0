"""Prefill attention as Pallas kernels for NVIDIA GPUs, through Triton: many queries of a head at once, on tensor cores.

One program attends with a block of queries of one head to the slots that they see, block by block (FlashAttention-2,
arXiv 2307.08691). Only blocks that some query sees in part need a mask; they lie at the diagonal and at a window's
edge. A second kernel, for the methods that ask for it, goes the other way: one program takes a block of slots and adds
up the attention that the slots receive.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Bool, Float, Int

from hshare_jax.kernels.int8_rows import Rows
from hshare_jax.kernels.masked_softmax import LOG2_E, MASKED
from hshare_jax.kernels.pallas_attention import in_place, in_registers, load_rows, scores_of, weighted
from hshare_jax.kernels.reference_prefill import sees
from hshare_jax.kernels.tiling import Tiles, prefill_tiles


@functools.partial(jax.jit, static_argnames=("window", "tiles", "interpret"))
def prefill_attention(
    q: Float[Array, "B T N H"],
    keys: Rows,
    values: Rows,
    starts: Int[Array, "B"],
    *,
    window: int | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """`reference_prefill.prefill_attention` as a kernel.

    Args:
        q, keys, values, starts, window: as `api.prefill_attention` takes them.
        tiles: the layout of the kernel; None takes the choice of `tiling`.
        interpret: whether the kernel runs in Pallas' interpreter.
    """
    (B, T, N, _), width = q.shape, max(16, pl.next_power_of_2(q.shape[3]))
    tiles = tiles or prefill_tiles(width, keys.dtype.itemsize, T, in_registers=in_registers(keys))
    inputs = (q.astype(keys.dtype), keys, values, starts)  # both operands of a dot have one type
    outputs = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32))
    return pl.pallas_call(
        functools.partial(_attend, window=window, tiles=tiles, width=width),
        grid=(pl.cdiv(T, tiles.queries), N, B),
        in_specs=in_place(inputs),
        out_specs=in_place(outputs),
        out_shape=outputs,
        compiler_params=plgpu.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret,
        name="prefill_attention",
    )(*inputs)


def _attend(
    q_ref,  # [B, T, N, H]
    keys_ref,  # [B, K, S, H], or Int8Rows of such references
    values_ref,  # as the keys
    starts_ref,  # [B]
    out_ref,  # [B, T, N, H]
    log_total_ref,  # [B, N, T]
    *,
    window: int | None,
    tiles: Tiles,
    width: int,
) -> None:
    """One program: one block of the queries of head n of row b."""
    turn, n, b = (pl.program_id(axis) for axis in range(3))
    (_, T, N, H), (_, K, S, _), block = q_ref.shape, keys_ref.shape, tiles.block
    first = (pl.num_programs(0) - 1 - turn) * tiles.queries  # the queries that see most begin first
    token = first + jnp.arange(tiles.queries, dtype=jnp.int32)
    columns = jnp.arange(width, dtype=jnp.int32)[None, :]
    is_query = (token < T)[:, None] & (columns < H)
    query = plgpu.load(q_ref.at[b, token[:, None], n, columns], mask=is_query, other=0)
    positions = starts_ref[b] + token
    lowest, highest = starts_ref[b] + first, starts_ref[b] + jnp.minimum(first + tiles.queries, T) - 1

    def read_block(index: Array, carry: tuple[Array, Array, Array], *, is_masked: bool) -> tuple[Array, Array, Array]:
        out, peak, total = carry
        slots = index * block + jnp.arange(block, dtype=jnp.int32)
        is_slot = slots < S if is_masked or width != H else None
        (key, key_scale), (value, value_scale) = (
            load_rows(ref, (b, n // (N // K)), slots, is_slot, columns) for ref in (keys_ref, values_ref)
        )
        scores = scores_of(query, key, key_scale) * (H**-0.5 * LOG2_E)
        if is_masked:
            scores = jnp.where(sees(positions[:, None], slots[None, :], window), scores, MASKED)
        # A query may see no slot of its first blocks. Their weights of 1 vanish with the first real peak.
        new_peak = jnp.maximum(peak, scores.max(axis=1))
        weights, shrink = jnp.exp2(scores - new_peak[:, None]), jnp.exp2(peak - new_peak)
        out = out * shrink[:, None] + weighted(weights, value, value_scale)
        return out, new_peak, total * shrink + weights.sum(axis=1)

    # Blocks [begin, end) hold what some query sees, and blocks [whole, part) what all of them see.
    end = jnp.minimum(pl.cdiv(highest + 1, block), pl.cdiv(S, block))
    begin = whole = 0
    if window is not None:
        begin = jnp.minimum(jnp.maximum(lowest - window + 1, 0) // block, end)
        whole = jnp.minimum(pl.cdiv(jnp.maximum(highest - window + 1, 0), block), end)
    part = jnp.maximum(jnp.minimum((lowest + 1) // block, jnp.minimum(S // block, end)), whole)
    carry = (
        jnp.zeros((tiles.queries, width), jnp.float32),
        jnp.full((tiles.queries,), MASKED, jnp.float32),
        jnp.zeros((tiles.queries,), jnp.float32),
    )
    if window is not None:
        carry = lax.fori_loop(begin, whole, functools.partial(read_block, is_masked=True), carry)
    carry = lax.fori_loop(whole, part, functools.partial(read_block, is_masked=False), carry)
    out, peak, total = lax.fori_loop(part, end, functools.partial(read_block, is_masked=True), carry)
    total = jnp.where(total > 0, total, 1)  # queries at position -1 see nothing
    out = (out / total[:, None]).astype(out_ref.dtype)
    plgpu.store(out_ref.at[b, token[:, None], n, columns], out, mask=is_query)
    plgpu.store(log_total_ref.at[b, n, token], (peak + jnp.log2(total)) / LOG2_E, mask=token < T)


@functools.partial(jax.jit, static_argnames=("window", "tiles", "interpret"))
def received_attention(
    q: Float[Array, "B T N H"],
    keys: Rows,
    starts: Int[Array, "B"],
    is_counted: Bool[Array, "B T"],
    log_total: Float[Array, "B N T"],
    *,
    window: int | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "B N S"]:
    """`reference_prefill.received_attention` as a kernel.

    Args:
        q, keys, starts, is_counted, log_total, window: as `reference_prefill.received_attention` takes them.
        tiles: the layout of the kernel; None takes the choice of `tiling`.
        interpret: whether the kernel runs in Pallas' interpreter.
    """
    (B, T, N, _), S, width = q.shape, keys.shape[2], max(16, pl.next_power_of_2(q.shape[3]))
    tiles = tiles or prefill_tiles(width, keys.dtype.itemsize, T, in_registers=in_registers(keys))
    inputs = (q.astype(keys.dtype), keys, starts, is_counted, log_total)
    output = jax.ShapeDtypeStruct((B, N, S), jnp.float32)
    return pl.pallas_call(
        functools.partial(_receive, window=window, tiles=tiles, width=width),
        grid=(pl.cdiv(S, tiles.block), N, B),
        in_specs=in_place(inputs),
        out_specs=in_place(output),
        out_shape=output,
        compiler_params=plgpu.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret,
        name="received_attention",
    )(*inputs)


def _receive(
    q_ref,  # [B, T, N, H]
    keys_ref,  # [B, K, S, H], or Int8Rows of such references
    starts_ref,  # [B]
    is_counted_ref,  # [B, T]
    log_total_ref,  # [B, N, T]
    out_ref,  # [B, N, S]
    *,
    window: int | None,
    tiles: Tiles,
    width: int,
) -> None:
    """One program: one block of the slots that head n of row b sees."""
    index, n, b = (pl.program_id(axis) for axis in range(3))
    (_, T, N, H), (_, K, S, _) = q_ref.shape, keys_ref.shape
    slots = index * tiles.block + jnp.arange(tiles.block, dtype=jnp.int32)
    columns = jnp.arange(width, dtype=jnp.int32)[None, :]
    key, key_scale = load_rows(keys_ref, (b, n // (N // K)), slots, slots < S, columns)
    start = starts_ref[b]

    def add_queries(turn: Array, received: Array) -> Array:
        token = turn * tiles.queries + jnp.arange(tiles.queries, dtype=jnp.int32)
        is_query = (token < T)[:, None] & (columns < H)
        query = plgpu.load(q_ref.at[b, token[:, None], n, columns], mask=is_query, other=0)
        log_total = plgpu.load(log_total_ref.at[b, n, token], mask=token < T, other=0)
        is_counted = plgpu.load(is_counted_ref.at[b, token], mask=token < T, other=False)
        scores = scores_of(query, key, key_scale) * H**-0.5
        is_added = sees(start + token[:, None], slots[None, :], window) & is_counted[:, None]
        return received + jnp.where(is_added, jnp.exp2((scores - log_total[:, None]) * LOG2_E), 0).sum(axis=0)

    # The queries [first, last) see some of the slots.
    first = jnp.maximum(index * tiles.block - start, 0)
    last = T if window is None else jnp.minimum((index + 1) * tiles.block - 1 + window - start, T)
    turns = jnp.minimum(first, T) // tiles.queries, pl.cdiv(jnp.maximum(last, 0), tiles.queries)
    received = lax.fori_loop(*turns, add_queries, jnp.zeros((tiles.block,), jnp.float32))
    plgpu.store(out_ref.at[b, n, slots], received, mask=slots < S)
