"""Decode attention as Triton kernels for NVIDIA GPUs, called through jax-triton: two ranges and a list, by the plan.

The kernels are in `triton_attention_kernels`. One reads; where lists are split, another merges the parts. The kernel
that writes the result also adds the tail, so a tail is no further kernel.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from hshare_jax.kernels.int8_rows import Int8Rows, Rows
from hshare_jax.kernels.masked_softmax import LOG2_E, MASKED
from hshare_jax.kernels.reads import mark_listed
from hshare_jax.kernels.tail import Part, Tail
from hshare_jax.kernels.tiling import Tiles, attention_tiles, power_of_two
from hshare_jax.kernels.triton_library import call_kernel, load_kernel
from hshare_jax.shapes import Lists, Source


def dense_decode(
    q: Float[Array, "B N H"],
    keys: Rows,
    values: Rows,
    lengths: Int[Array, "B"],
    *,
    window: int | None = None,
    tiles: Tiles | None = None,
) -> Float[Array, "B N H"]:
    """`api.dense_decode` as a kernel. Slots that are not read may even be infinite or NaN.

    Args:
        q, keys, values, lengths, window: as `api.dense_decode` takes them.
        tiles: the layout of the kernel; None takes the choice of `tiling`.
    """
    _, K, S, _ = keys.shape
    tiles = tiles or _tiles(keys, K, min(S, window or S))
    return _decode(q, keys, values, None, lengths, jnp.zeros_like(lengths), None, window=window, tiles=tiles)


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
) -> Float[Array, "B N H"]:
    """`api.sparse_decode` as a kernel. Slots that are not read may even be infinite or NaN.

    Rows under `min_length` read everything in this same kernel, in other blocks than `dense_decode`. So they equal it
    within rounding and not bit for bit.

    Args:
        q to tail: as `api.sparse_decode` takes them.
        tiles: the layout of the kernel; None takes the choice of `tiling`.
    """
    # A recent range that begins at slot 0 holds everything. Sinks and list end where it begins, so they are then empty.
    start = jnp.where(lengths < min_length, 0, recent_start)
    _, _, J, C = lists.shape
    tiles = tiles or _tiles(keys, J, num_sinks + C + max_recent)
    plan = lists, source, jnp.full((1,), layer, jnp.int32)
    return _decode(q, keys, values, plan, lengths, start, tail, num_sinks=num_sinks, window=window, tiles=tiles)


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
    tiles: Tiles | None = None,
) -> tuple[Part, Part]:
    """`api.split_decode`: each part is dense attention that skips the slots of the other part. XLA merges the splits.

    Args:
        q to window: as `api.split_decode` takes them.
        tiles: the layout of the kernel; None takes the choice of `tiling`.
    """
    S, J = keys.shape[2], listed.shape[1]
    marks = mark_listed(listed, recent_start, num_sinks, S).astype(jnp.int8)
    tiles = tiles or _tiles(keys, J, min(S, window or S))
    return (
        _read_marked(q, keys, values, marks, 1, lengths, window=window, tiles=tiles),
        _read_marked(q, keys, values, marks, 0, lengths, window=window, tiles=tiles),
    )


def _tiles(keys: Rows, num_lists: int, max_slots: int) -> Tiles:
    B, _, _, H = keys.shape
    in_registers = (
        keys.dtype == jnp.float32
    )  # Triton multiplies float32 so, whether the cache has it or codes of 8 bits
    return attention_tiles(padded(H), keys.dtype.itemsize, B * num_lists, max_slots, in_registers=in_registers)


def padded(size: int) -> int:
    """A size of at least 16, a power of two, as the sides of a dot are."""
    return max(16, power_of_two(size, up=True))


# Jitted, so that all layers of a step share one trace.
@functools.partial(jax.jit, static_argnames=("num_sinks", "window", "tiles"))
def _decode(
    q: Array, keys: Rows, values: Rows, plan: tuple[Array, Array, Array] | None, lengths: Array, start: Array,
    tail: Tail | None, *, num_sinks: int = 0, window: int | None, tiles: Tiles,
) -> Array:  # fmt: skip
    """Attention [B, N, H] by the kernels. The plan is (lists, source, layer); None is dense attention."""
    (B, N, H), S, J = q.shape, keys.shape[2], keys.shape[1] if plan is None else plan[1].shape[2]
    dtype, splits, num_virtual = q.dtype, tiles.splits, 0 if tail is None else tail.keys.shape[2]
    # A row whose cache is full goes on without its new token. Both operands of a dot have one type.
    lengths, q = jnp.minimum(lengths, S), q.astype(keys.dtype)
    of_tail = (None, None, None) if tail is None else (tail.keys, tail.values, tail.terms)
    tails = dict(zip(("tail_keys", "tail_values", "tail_terms"), of_tail, strict=True))
    out, log_total, *tally = _attend(
        q, keys, values, plan, None, 0, lengths, start, tails, jnp.dtype(dtype if splits == 1 else jnp.float32),
        num_lists=J, num_sinks=num_sinks, window=window, tiles=tiles, with_tally=tail is not None and splits > 1,
    )  # fmt: skip
    if splits == 1:
        return out[:, :, 0]
    score_sums, num_reads = tally or (None, None)
    arrays = {"parts": out, "log_totals": log_total, "score_sums": score_sums, "num_reads": num_reads} | tails
    arrays |= {"lengths": None, "q": None} if tail is None else {"lengths": lengths, "q": q}
    sizes = {"N": N, "H": H, "J": J, "WINDOW": window or S, "TAIL": num_virtual, "WIDTH": padded(H), "SPLITS": splits}
    shape, kernel = jax.ShapeDtypeStruct((B, N, H), dtype), load_kernel("attention", "merge_splits")
    few = Tiles(0, num_warps=1 if splits * H <= 1024 else 4, num_stages=1)
    return call_kernel(kernel, arrays, {"out": shape}, grid=(N, B, 1), tiles=few, sizes=sizes)[0]


def _attend(
    q: Array, keys: Rows, values: Rows, plan: tuple[Array, Array, Array] | None, marks: Array | None, wanted: int,
    lengths: Array, start: Array, tails: dict[str, Array | None], dtype: jnp.dtype, *, num_lists: int, num_sinks: int,
    window: int | None, tiles: Tiles, with_tally: bool,
) -> list[Array]:  # fmt: skip
    """What the kernel `attend` writes: the parts and the logs of their sums, and with a tally two arrays more."""
    (B, N, H), (_, K, S, _), J, splits = q.shape, keys.shape, num_lists, tiles.splits
    lists, source, layer = plan or (None, None, None)
    key_codes, key_scales = codes_and_scales(keys)
    value_codes, value_scales = codes_and_scales(values)
    arrays = {
        "q": q, "keys": key_codes, "key_scales": key_scales, "values": value_codes, "value_scales": value_scales,
        "lists": lists, "source": source, "layer": layer, "marks": marks, "lengths": lengths, "start": start,
    } | tails  # fmt: skip
    per_head = jax.ShapeDtypeStruct((B, N, splits), jnp.float32)
    outputs = {
        "out": jax.ShapeDtypeStruct((B, N, splits, H), dtype),
        "log_total": per_head,
        "score_sum": per_head if with_tally else None,
        "num_read": jax.ShapeDtypeStruct((B, J, splits), jnp.int32) if with_tally else None,
    }
    group_size, tail_keys = N // J, tails["tail_keys"]
    sizes = {
        "N": N, "K": K, "S": S, "H": H, "L": 0 if source is None else source.shape[1], "J": J,
        "C": 0 if lists is None else lists.shape[3], "NUM_SINKS": num_sinks, "WINDOW": window or S, "WANTED": wanted,
        "TAIL": 0 if tail_keys is None else tail_keys.shape[2],
        "HEADS": 1 if group_size == 1 else padded(group_size), "WIDTH": padded(H), "BLOCK": tiles.block,
        "SPLITS": splits,
    }  # fmt: skip
    kernel = load_kernel("attention", "attend")
    return call_kernel(kernel, arrays, outputs, grid=(splits, J, B), tiles=tiles, sizes=sizes)


def codes_and_scales(rows: Rows) -> tuple[Array, Array | None]:
    """The numbers of a cache, and the scales of one in 8 bits."""
    return (rows.qvalue, rows.scale) if isinstance(rows, Int8Rows) else (rows, None)


@functools.partial(jax.jit, static_argnames=("wanted", "window", "tiles"))
def _read_marked(
    q: Array, keys: Rows, values: Rows, marks: Array, wanted: int, lengths: Array, *, window: int | None, tiles: Tiles
) -> Part:
    """The attention over those slots that a row sees and whose marks [B, J, S] are `wanted`."""
    J, tails = marks.shape[1], dict.fromkeys(("tail_keys", "tail_values", "tail_terms"))
    lengths, start = jnp.minimum(lengths, keys.shape[2]), jnp.zeros_like(lengths)
    out, log_total, score_sum, num_read = _attend(
        q.astype(keys.dtype), keys, values, None, marks, wanted, lengths, start, tails, jnp.dtype(jnp.float32),
        num_lists=J, num_sinks=0, window=window, tiles=tiles, with_tally=True,
    )  # fmt: skip
    peak = log_total.max(axis=-1, keepdims=True)
    weights = jnp.exp2(log_total - peak)
    total = weights.sum(axis=-1)
    merged = jnp.einsum("BNX,BNXH->BNH", weights / total[..., None], out)
    count = jnp.repeat(num_read.sum(axis=-1), q.shape[1] // J, axis=1)
    log_total = jnp.where(count > 0, (peak[..., 0] + jnp.log2(total)) / LOG2_E, MASKED)
    return Part(merged, log_total, score_sum.sum(axis=-1) / (LOG2_E * jnp.maximum(count, 1)), count)
