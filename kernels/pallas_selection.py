"""Selection as Pallas kernels for NVIDIA GPUs, through Triton: label scores and exact top-k, written into the lists.

One program holds the scores of one list's slots in registers, finds the C-th highest by bisection of its bits, and
writes the chosen slots in ascending order: no sort, and no score goes to memory. Of a cache too long for that every
program takes a chunk and keeps its C best, of which one more kernel takes the C best. A program whose list is a copy
leaves at once. The definition is `critical_tokens.find_critical_tokens` on `labels.score_labels`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Bool, Float, Int

from hshare_jax.kernels.reference_attention import EMPTY, MASKED
from hshare_jax.kernels.tiling import Tiles, merge_tiles, selection_tiles
from hshare_jax.shapes import Lists, Source

IS_DUE, FIRST, LAST, ALLOWED = range(4)  # what the kernels are told of each row


def select_labels(
    lists: Lists,
    layer: int,
    query: Float[Array, "B N R"],
    codes: Array,
    scales: Float[Array, "B K 2 S"] | None,
    source: Source,
    is_due: Bool[Array, "B"],
    first: Int[Array, "B"],
    last: Int[Array, "B"],
    num_allowed: Int[Array, "B"],
    *,
    dilate: bool = False,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Lists:
    """Returns the lists, in place, with those of a layer chosen anew by label scores: its own sources, in rows due.

    Args:
        lists: of all layers.
        layer: whose lists are chosen.
        query: the queries on their label channels, scaled: as `labels.label_query` has them, float32.
        codes: of the layer's labels [B, K, R, S], or two 4-bit codes a byte [B, K, half, S].
        scales: offset and step of each slot; None where the codes are the labels themselves.
        source: the plan; a list that is not its own source stays as it is.
        is_due: the rows that choose.
        first, last: the slots [first, last) of each row compete.
        num_allowed: how many each list may hold, at most C.
        dilate: each slot counts at least what the one before it does (`critical_tokens.dilate`).
        tiles, interpret: how it runs; None takes `tiling`'s choice.
    """
    return _select(
        lists, None, query, codes, scales, source, is_due, first, last, num_allowed, jnp.int32(layer),
        dilate=dilate, tiles=tiles, interpret=interpret,
    )  # fmt: skip


def select_scores(
    lists: Lists,
    layer: int,
    scores: Float[Array, "B J S"],
    source: Source,
    is_due: Bool[Array, "B"],
    first: Int[Array, "B"],
    last: Int[Array, "B"],
    num_allowed: Int[Array, "B"],
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Lists:
    """Returns the lists, in place, chosen by scores that are there already; arguments are those of `select_labels`.

    Scores may be anything but NaN where they compete; ties go to the lower slot.
    """
    return _select(
        lists, scores, None, None, None, source, is_due, first, last, num_allowed, jnp.int32(layer),
        dilate=False, tiles=tiles, interpret=interpret,
    )  # fmt: skip


class _Given(NamedTuple):
    """What the kernels read, whole arrays in the GPU's memory."""

    source: Any  # [B, L, J] int32
    layer: Any  # [1] int32
    bounds: Any  # [4, B] int32: IS_DUE, FIRST, LAST, ALLOWED
    scores: Any = None  # [B, J, S], or what makes them:
    query: Any = None  # [B, N, R] float32
    codes: Any = None
    scales: Any = None
    stats: Any = None  # [B, J, G, 2, chunks] float32: peak and sum of exponentials of each chunk's scores
    best: Any = None  # [2, B, J, chunks * kept] int32: slots and their order, of the best of each chunk


@functools.partial(jax.jit, static_argnames=("dilate", "tiles", "interpret"))
def _select(
    lists: Array, scores: Array | None, query: Array | None, codes: Array | None, scales: Array | None,
    source: Array, is_due: Array, first: Array, last: Array, num_allowed: Array, layer: Array, *,
    dilate: bool, tiles: Tiles | None, interpret: bool,
) -> Array:  # fmt: skip
    (B, _, J), C = source.shape, lists.shape[3]
    if scores is not None:
        G, S = 1, scores.shape[2]
    else:
        assert query is not None
        assert codes is not None
        G, S = query.shape[1] // J, codes.shape[3]
        if query.shape[2] > codes.shape[2] and query.shape[2] % 2:  # the last byte holds one code
            query = jnp.pad(query, ((0, 0), (0, 0), (0, 1)))
    tiles = selection_tiles(S, G) if tiles is None else tiles
    chunks, kept = pl.cdiv(S, tiles.block), min(C, tiles.block)
    merging = merge_tiles(chunks * kept)
    bounds = jnp.stack([is_due.astype(jnp.int32), first, jnp.minimum(last, S), jnp.minimum(num_allowed, C)])
    given = _Given(source, layer.reshape(1), bounds, scores, query, codes, scales)
    call = functools.partial(_call, num_lists=J, grid=(chunks, J, B), tiles=tiles, interpret=interpret)

    def weigh(given: _Given, chunk: Array, j: Array, b: Array) -> tuple[Array, Array]:
        """Returns (weights as numbers in their order, 0 where a slot does not compete; slots) of one chunk."""
        slots = chunk * tiles.block + jnp.arange(tiles.block, dtype=jnp.int32)
        is_candidate = _is_candidate(given, b, slots)
        by_head = _score(given, b, j, slots, is_whole=S % tiles.block == 0)
        stats = None  # of one head none are needed: the order of its scores is that of its weights
        if G > 1:
            stats = [_stats(s, is_candidate) for s in by_head] if chunks == 1 else _load_stats(given.stats, b, j)
        weights = _pool(by_head, stats, is_candidate)
        if dilate:
            before = _score(given, b, j, slots - 1, is_whole=False)
            weights = jnp.maximum(weights, _pool(before, stats, _is_candidate(given, b, slots - 1)))
        return jnp.where(is_candidate, _sortable(weights), 0), slots

    def select(given: _Given, lists_ref, chunk: Array, j: Array, b: Array) -> None:
        order, slots = weigh(given, chunk, j, b)
        into_list = (lambda at: lists_ref.at[given.layer[0], b, j, at], lambda _: slots, EMPTY)
        _write_chosen(lambda _: order, 1, given.bounds[ALLOWED, b], C, into_list)

    def find_stats(given: _Given, stats_ref, chunk: Array, j: Array, b: Array) -> None:
        slots = chunk * tiles.block + jnp.arange(tiles.block, dtype=jnp.int32)
        is_candidate = _is_candidate(given, b, slots)
        for g, scores in enumerate(_score(given, b, j, slots, is_whole=S % tiles.block == 0)):
            stats_ref[b, j, g, 0, chunk], stats_ref[b, j, g, 1, chunk] = _stats(scores, is_candidate)

    def select_in_chunk(given: _Given, best_ref, chunk: Array, j: Array, b: Array) -> None:
        order, slots = weigh(given, chunk, j, b)
        at_slots, at_order = (lambda at, part=part: best_ref.at[part, b, j, chunk, at] for part in (0, 1))
        as_int = lambda _: lax.bitcast_convert_type(order, jnp.int32)  # noqa: E731
        _write_chosen(lambda _: order, 1, kept, kept, (at_slots, lambda _: slots, EMPTY), (at_order, as_int, 0))

    def merge(given: _Given, lists_ref, _: Array, j: Array, b: Array) -> None:
        def load(part: int, block: Array | int) -> Array:
            index = block * merging.block + jnp.arange(merging.block, dtype=jnp.int32)
            return plgpu.load(given.best.at[part, b, j, index], mask=index < chunks * kept, other=0)

        into_list = (lambda at: lists_ref.at[given.layer[0], b, j, at], lambda block: load(0, block), EMPTY)
        _write_chosen(
            lambda block: lax.bitcast_convert_type(load(1, block), jnp.uint32),
            pl.cdiv(chunks * kept, merging.block), given.bounds[ALLOWED, b], C, into_list,
        )  # fmt: skip

    if chunks == 1:
        return call(select, lists, given, name="select_tokens")
    if G > 1:
        stats = jax.ShapeDtypeStruct((B, J, G, 2, chunks), jnp.float32)
        given = given._replace(stats=call(find_stats, stats, given, name="softmax_statistics"))
    best = jax.ShapeDtypeStruct((2, B, J, chunks, kept), jnp.int32)  # slots, and their order
    best = call(select_in_chunk, best, given, name="select_in_chunks")
    given = _Given(given.source, given.layer, bounds, best=best.reshape(2, B, J, chunks * kept))
    return call(merge, lists, given, grid=(1, J, B), tiles=merging, name="select_of_chunks")


def _call(
    body: Callable, out: Array | jax.ShapeDtypeStruct, given: _Given, *, num_lists: int, grid: tuple, name: str,
    tiles: Tiles, interpret: bool,
) -> Array:  # fmt: skip
    """Runs body(given, out, chunk, j, b) for the lists that are chosen; an array `out` is written in place."""
    is_array = isinstance(out, jax.Array)
    arrays = {field: array for field, array in given._asdict().items() if array is not None}

    def kernel(*refs) -> None:
        *read, out_ref = refs[1:] if is_array else refs
        given = _Given(**dict(zip(arrays, read, strict=True)))
        chunk, j, b = (pl.program_id(axis) for axis in range(3))

        is_own = given.source[b, given.layer[0], j] == given.layer[0] * num_lists + j

        @pl.when(is_own & (given.bounds[IS_DUE, b] != 0))
        def _() -> None:
            body(given, out_ref, chunk, j, b)

    everywhere = pl.BlockSpec(memory_space=pl.ANY)
    inputs = ([out] if is_array else []) + list(arrays.values())
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[everywhere] * len(inputs),
        out_specs=everywhere,
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        input_output_aliases={0: 0} if is_array else {},
        compiler_params=plgpu.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret,
        name=name,
    )(*inputs)


def _is_candidate(given: _Given, b: Array, slots: Array) -> Array:
    return (slots >= given.bounds[FIRST, b]) & (slots < given.bounds[LAST, b])


def _score(given: _Given, b: Array, j: Array, slots: Array, *, is_whole: bool) -> list[Array]:
    """Returns the scores of each of the list's query heads; anything where a slot does not compete.

    Loads are masked only where slots may lie outside the cache: a mask of its own for each slot would make them narrow.
    """
    S = (given.codes if given.scores is None else given.scores).shape[-1]
    mask = None if is_whole else (slots >= 0) & (slots < S)

    def load(ref) -> Array:
        return plgpu.load(ref, mask=mask, other=None if is_whole else 0)

    if given.scores is not None:
        return [load(given.scores.at[b, j, slots]).astype(jnp.float32)]
    (_, N, R), (_, K, num_codes, _), J = given.query.shape, given.codes.shape, given.source.shape[2]
    G, k = N // J, j // (J // K)
    heads = [j * G + g for g in range(G)]

    def add(r: Array, scores: tuple[Array, ...]) -> tuple[Array, ...]:
        """Adds channel r, or the two that share byte r, to each head's q . code."""
        code = load(given.codes.at[b, k, r, slots])
        parts = [(code & 15, r), (code >> 4, r + num_codes)] if num_codes < R else [(code, r)]
        for part, channel in parts:
            part = part.astype(jnp.float32)
            scores = tuple(s + given.query[b, n, channel] * part for s, n in zip(scores, heads, strict=True))
        return scores

    scores = lax.fori_loop(0, num_codes, add, (jnp.zeros(slots.shape, jnp.float32),) * G)
    if given.scales is None:
        return list(scores)
    channels = jnp.arange(pl.next_power_of_2(R), dtype=jnp.int32)
    sums = [plgpu.load(given.query.at[b, n, channels], mask=channels < R, other=0).sum() for n in heads]
    offset, step = (load(given.scales.at[b, k, part, slots]).astype(jnp.float32) for part in (0, 1))
    return [s * step + q * offset for s, q in zip(scores, sums, strict=True)]  # q . (offset + step * code)


def _stats(scores: Array, is_candidate: Array) -> tuple[Array, Array]:
    """Returns (peak, sum of exponentials) of a head's scores over these slots."""
    peak = jnp.where(is_candidate, scores, MASKED).max()
    return peak, jnp.where(is_candidate, jnp.exp(scores - peak), 0).sum()


def _load_stats(stats_ref, b: Array, j: Array) -> list[tuple[Array, Array]]:
    """Returns `_stats` over all chunks, for each of the list's heads."""
    G, chunks = stats_ref.shape[2], stats_ref.shape[4]
    chunk = jnp.arange(pl.next_power_of_2(chunks), dtype=jnp.int32)
    found = []
    for g in range(G):
        peaks = plgpu.load(stats_ref.at[b, j, g, 0, chunk], mask=chunk < chunks, other=MASKED)
        totals = plgpu.load(stats_ref.at[b, j, g, 1, chunk], mask=chunk < chunks, other=0)
        peak = peaks.max()
        found.append((peak, (totals * jnp.exp(peaks - peak)).sum()))
    return found


def _pool(by_head: list[Array], stats: list[tuple[Array, Array]] | None, is_candidate: Array) -> Array:
    """Returns the weight of each slot, the sum of its heads' softmaxed scores; -inf where it does not compete."""
    weights = by_head
    if stats is not None:
        weights = [jnp.exp(scores - peak) / total for scores, (peak, total) in zip(by_head, stats, strict=True)]
    return jnp.where(is_candidate, sum(weights[1:], weights[0]), -jnp.inf)


def _sortable(scores: Float[Array, "slots"]) -> Array:
    """Returns uint32, above 0, in the order of the float32 scores; the zeros are one value."""
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _write_chosen(
    load_order: Callable[[Array | int], Array], num_blocks: int, allowed: Array | int, size: int,
    *outputs: tuple[Callable, Callable[[Array | int], Array], int],
) -> None:  # fmt: skip
    """Writes what belongs to the `allowed` highest candidates, in the order of their slots; ties go to the lower slot.

    Args:
        load_order: a block's candidates as numbers in their order; 0 is no candidate. Of a single block they stay in
            registers; of several they are loaded anew for each bit.
        num_blocks: how many blocks there are.
        allowed: how many may be chosen.
        size: places of an output; those that are left over are filled.
        outputs: (what refers to a place, a block's values: loaded as late as possible, to save registers; the filling).
    """
    if num_blocks == 1:
        order = load_order(0)
        load_order = lambda _: order  # noqa: E731

    def count(is_counted: Callable[[Array], Array]) -> Array:
        def add(block: Array | int, total: Array) -> Array:
            return total + is_counted(load_order(block)).astype(jnp.int32).sum()

        return _loop(num_blocks, add, jnp.int32(0))

    wanted = jnp.minimum(allowed, count(lambda order: order > 0))

    def raise_bit(index: Array, least: Array) -> Array:
        higher = least | jnp.uint32(1) << (31 - index).astype(jnp.uint32)
        return jnp.where(count(lambda order: order >= higher) >= wanted, higher, least)

    threshold = lax.fori_loop(0, 32, raise_bit, jnp.uint32(0))
    missing = wanted - count(lambda order: order > threshold)

    def write(block: Array | int, before: tuple[Array, Array]) -> tuple[Array, Array]:
        num_tied, num_listed = before
        order = load_order(block)
        is_tied = (order == threshold) & (order > 0)
        ties = num_tied + jnp.cumsum(is_tied.astype(jnp.int32))
        is_listed = (order > threshold) | (is_tied & (ties <= missing))
        place = num_listed + jnp.cumsum(is_listed.astype(jnp.int32)) - 1
        for ref_at, values, _ in outputs:
            # Lanes that write nothing point past the end: interpreted, they would write what was there before.
            plgpu.store(ref_at(jnp.where(is_listed, place, size)), values(block), mask=is_listed)
        return num_tied + is_tied.astype(jnp.int32).sum(), num_listed + is_listed.astype(jnp.int32).sum()

    _loop(num_blocks, write, (jnp.int32(0), jnp.int32(0)))
    rest = jnp.arange(pl.next_power_of_2(size), dtype=jnp.int32)
    is_rest = (rest >= wanted) & (rest < size)
    for ref_at, _, filling in outputs:
        plgpu.store(ref_at(jnp.where(is_rest, rest, size)), jnp.full(rest.shape, filling, jnp.int32), mask=is_rest)


def _loop(count: int, body: Callable, carry: Any) -> Any:
    return body(0, carry) if count == 1 else lax.fori_loop(0, count, body, carry)
