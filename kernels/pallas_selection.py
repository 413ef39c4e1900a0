"""The choice of critical tokens as Pallas kernels for NVIDIA GPUs, through Triton: label scores and exact top-k.

One program holds the scores of one list's slots in registers, finds the C-th highest by bisection of the bits, and
writes the chosen slots into the list in ascending order. So nothing is sorted, and no score goes to memory. If the
cache is too long for that, each program takes a chunk of it and keeps the C best slots, and one more kernel takes the C
best of all chunks. A program whose list is not chosen leaves at once.
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
from jaxtyping import Bool, Float, Int

from hshare_jax.kernels.choose_tokens import weigh_tokens
from hshare_jax.kernels.int8_rows import Rows
from hshare_jax.kernels.labels import Labels, score_keys
from hshare_jax.kernels.masked_softmax import MASKED
from hshare_jax.kernels.pallas_attention import in_place
from hshare_jax.kernels.tiling import Tiles, merge_tiles, selection_tiles
from hshare_jax.shapes import EMPTY, Lists, Source

IS_DUE, FIRST, LAST, ALLOWED = range(4)  # the rows of `_Given.bounds`


def select_by_labels(
    lists: Lists,
    layer: int,
    query: Float[Array, "B N R"],
    labels: Labels,
    source: Source,
    is_due: Bool[Array, "B"],
    first: Int[Array, "B"],
    last: Int[Array, "B"],
    num_allowed: Int[Array, "B"] | None,
    *,
    dilate: bool = False,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Lists:
    """`api.select_by_labels` as kernels, which write the lists in place.

    Args:
        lists to dilate: as `api.select_by_labels` takes them.
        tiles: the layout of the kernels; None takes the choice of `tiling`.
        interpret: whether the kernels run in Pallas' interpreter.
    """
    num_slots, group_size = labels.codes.shape[3], query.shape[1] // source.shape[2]
    layout = _lay_out(lists, num_slots, group_size, dilate, tiles)
    given = _Given(source, jnp.int32(layer), query=query, codes=labels.codes, scales=labels.scales)
    return _select(lists, given, (is_due, first, last, num_allowed), layout=layout, interpret=interpret)


def select_by_keys(
    lists: Lists,
    layer: int,
    q: Float[Array, "B N H"],
    keys: Rows,
    source: Source,
    is_due: Bool[Array, "B"],
    first: Int[Array, "B"],
    last: Int[Array, "B"],
    num_allowed: Int[Array, "B"] | None,
    *,
    dilate: bool = False,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Lists:
    """`api.select_by_keys`: the weights are taken by XLA, the choice is a kernel, which writes the lists in place.

    Args:
        lists to dilate: as `api.select_by_keys` takes them.
        tiles, interpret: as for `select_by_labels`.
    """
    weights = weigh_tokens(score_keys(q, keys), first, last, num_lists=source.shape[2], dilate=dilate)
    return select_by_scores(
        lists, layer, weights, source, is_due, first, last, num_allowed, tiles=tiles, interpret=interpret
    )


def select_by_scores(
    lists: Lists,
    layer: int,
    scores: Float[Array, "B J S"],
    source: Source,
    is_due: Bool[Array, "B"],
    first: Int[Array, "B"],
    last: Int[Array, "B"],
    num_allowed: Int[Array, "B"] | None,
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Lists:
    """The lists of all layers, after one layer's lists are chosen anew, in place, by scores that exist already.

    Args:
        scores: one score per list and slot. Scores of slots that compete must not be NaN.
        lists, layer, source, is_due, first, last, num_allowed, tiles, interpret: as for `select_by_labels`.
    """
    layout = _lay_out(lists, scores.shape[2], group_size=1, dilate=False, tiles=tiles)
    given = _Given(source, jnp.int32(layer), scores=scores)
    return _select(lists, given, (is_due, first, last, num_allowed), layout=layout, interpret=interpret)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The static sizes of the kernels."""

    num_slots: int  # S
    group_size: int  # G, query heads that a list serves; 1 where its scores exist already
    list_size: int  # C
    dilate: bool
    tiles: Tiles  # of the kernels that see the cache: one block of slots is one chunk
    merging: Tiles  # of the kernel that sees the best of all chunks

    @property
    def num_chunks(self) -> int:
        return pl.cdiv(self.num_slots, self.tiles.block)

    @property
    def num_kept(self) -> int:
        """The slots that each chunk keeps."""
        return min(self.list_size, self.tiles.block)

    @property
    def divides(self) -> bool:
        """Whether the chunks are all of the cache and nothing more."""
        return self.num_slots % self.tiles.block == 0


def _lay_out(lists: Array, num_slots: int, group_size: int, dilate: bool, tiles: Tiles | None) -> _Layout:
    """The sizes for a cache and its lists. Each list serves `group_size` query heads."""
    tiles = selection_tiles(num_slots, group_size) if tiles is None else tiles
    C = lists.shape[3]
    merging = merge_tiles(pl.cdiv(num_slots, tiles.block) * min(C, tiles.block))
    return _Layout(num_slots, group_size, C, dilate, tiles, merging)


class _Given(NamedTuple):
    """The inputs of the kernels: whole arrays in the GPU's memory, or the references to them inside a kernel."""

    source: Any  # [B, L, J] int32
    layer: Any  # [1] int32
    bounds: Any = None  # [4, B] int32: IS_DUE, FIRST, LAST, ALLOWED
    scores: Any = None  # [B, J, S]; or instead of it the query and the labels that it is computed from:
    query: Any = None  # [B, N, R] float32
    codes: Any = None  # as in Labels
    scales: Any = None  # as in Labels
    stats: Any = None  # [B, J, G, 2, chunks] float32: peak and sum of exponentials of each chunk's scores
    best: Any = None  # [2, B, J, chunks * kept] int32: the best slots of each chunk, and numbers in their order


@functools.partial(jax.jit, static_argnames=("layout", "interpret"))
def _select(
    lists: Array, given: _Given, rows: tuple[Array, Array, Array, Array | None], *, layout: _Layout, interpret: bool
) -> Array:
    """The lists after a layer's lists are chosen in one kernel, or by chunks and then among the best of all chunks.

    Args:
        lists: of all layers.
        given: the inputs, without `bounds`, which are made here.
        rows: is_due, first, last and num_allowed of each row.
        layout, interpret: how the kernels run.
    """
    _, B, J, _ = lists.shape
    chunks, kept = layout.num_chunks, layout.num_kept
    given = given._replace(layer=given.layer.reshape(1), bounds=_bounds(rows, layout), query=_pad(given))
    call = functools.partial(_call, layout=layout, interpret=interpret)
    if chunks == 1:
        return call(_select_whole, lists, given, name="select_tokens")
    if layout.group_size > 1:
        stats = jax.ShapeDtypeStruct((B, J, layout.group_size, 2, chunks), jnp.float32)
        given = given._replace(stats=call(_find_stats, stats, given, name="softmax_statistics"))
    best = jax.ShapeDtypeStruct((2, B, J, chunks, kept), jnp.int32)
    best = call(_select_in_chunk, best, given, name="select_in_chunks")
    given = _Given(given.source, given.layer, given.bounds, best=best.reshape(2, B, J, chunks * kept))
    return call(_select_of_chunks, lists, given, is_merging=True, name="select_of_chunks")


def _bounds(rows: tuple[Array, Array, Array, Array | None], layout: _Layout) -> Array:
    is_due, first, last, num_allowed = rows
    allowed = jnp.full_like(last, layout.list_size) if num_allowed is None else num_allowed
    return jnp.stack(
        [is_due.astype(jnp.int32), first, jnp.minimum(last, layout.num_slots), jnp.minimum(allowed, layout.list_size)]
    )


def _pad(given: _Given) -> Array | None:
    """The query, with a channel of zeros for the high bits of the last byte if that byte holds a single code."""
    if given.query is None or given.query.shape[2] <= given.codes.shape[2] or given.query.shape[2] % 2 == 0:
        return given.query
    return jnp.pad(given.query, ((0, 0), (0, 0), (0, 1)))


def _call(
    body: Callable[..., None], out: Array | jax.ShapeDtypeStruct, given: _Given, *, name: str, layout: _Layout,
    interpret: bool, is_merging: bool = False,
) -> Array:  # fmt: skip
    """Runs body(layout, given, out, chunk, j, b) for the lists that are chosen. An array `out` is written in place."""
    is_array = isinstance(out, jax.Array)
    arrays = {field: array for field, array in given._asdict().items() if array is not None}
    (B, _, J), tiles = given.source.shape, layout.merging if is_merging else layout.tiles

    def kernel(*refs) -> None:
        *read, out_ref = refs[1:] if is_array else refs
        given = _Given(**dict(zip(arrays, read, strict=True)))
        chunk, j, b = (pl.program_id(axis) for axis in range(3))
        is_own = given.source[b, given.layer[0], j] == given.layer[0] * J + j

        @pl.when(is_own & (given.bounds[IS_DUE, b] != 0))
        def _() -> None:
            body(layout, given, out_ref, chunk, j, b)

    inputs = ([out] if is_array else []) + list(arrays.values())
    output = jax.ShapeDtypeStruct(out.shape, out.dtype)
    return pl.pallas_call(
        kernel,
        grid=(1 if is_merging else layout.num_chunks, J, B),
        in_specs=in_place(inputs),
        out_specs=in_place(output),
        out_shape=output,
        input_output_aliases={0: 0} if is_array else {},
        compiler_params=plgpu.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret,
        name=name,
    )(*inputs)


# The bodies of the kernels. Each is one program: chunk `chunk` of the slots of list `j` of row `b`.


def _select_whole(layout: _Layout, given: _Given, lists_ref, chunk: Array, j: Array, b: Array) -> None:
    """Writes the list of a cache that is a single chunk."""
    order, slots = _weigh(layout, given, chunk, j, b)
    into_list = _Output(lambda at: lists_ref.at[given.layer[0], b, j, at], lambda _: slots, EMPTY)
    _write_chosen(lambda _: order, 1, given.bounds[ALLOWED, b], layout.list_size, into_list)


def _find_stats(layout: _Layout, given: _Given, stats_ref, chunk: Array, j: Array, b: Array) -> None:
    """Writes the peak and the sum of exponentials of each head's scores over a chunk."""
    slots = _slots_of(layout, chunk)
    is_candidate = _is_candidate(given, b, slots)
    for g, scores in enumerate(_score(given, b, j, slots, is_whole=layout.divides)):
        stats_ref[b, j, g, 0, chunk], stats_ref[b, j, g, 1, chunk] = _stats(scores, is_candidate)


def _select_in_chunk(layout: _Layout, given: _Given, best_ref, chunk: Array, j: Array, b: Array) -> None:
    """Writes the best slots of a chunk, and numbers in their order."""
    order, slots = _weigh(layout, given, chunk, j, b)
    kept = layout.num_kept
    best_slots = _Output(lambda at: best_ref.at[0, b, j, chunk, at], lambda _: slots, EMPTY)
    best_order = _Output(
        lambda at: best_ref.at[1, b, j, chunk, at], lambda _: lax.bitcast_convert_type(order, jnp.int32), 0
    )
    _write_chosen(lambda _: order, 1, kept, kept, best_slots, best_order)


def _select_of_chunks(layout: _Layout, given: _Given, lists_ref, chunk: Array, j: Array, b: Array) -> None:
    """Writes the list from the best slots of all chunks."""
    del chunk  # there is only one
    num_candidates, block_size = layout.num_chunks * layout.num_kept, layout.merging.block

    def load(part: int, block: Array | int) -> Array:
        index = block * block_size + jnp.arange(block_size, dtype=jnp.int32)
        return plgpu.load(given.best.at[part, b, j, index], mask=index < num_candidates, other=0)

    into_list = _Output(lambda at: lists_ref.at[given.layer[0], b, j, at], lambda block: load(0, block), EMPTY)
    _write_chosen(
        lambda block: lax.bitcast_convert_type(load(1, block), jnp.uint32),
        pl.cdiv(num_candidates, block_size), given.bounds[ALLOWED, b], layout.list_size, into_list,
    )  # fmt: skip


# What the bodies are made of.


def _weigh(layout: _Layout, given: _Given, chunk: Array, j: Array, b: Array) -> tuple[Array, Array]:
    """Numbers in the order of the weights of a chunk's slots, 0 where a slot does not compete; and the slots."""
    slots = _slots_of(layout, chunk)
    is_candidate = _is_candidate(given, b, slots)
    by_head = _score(given, b, j, slots, is_whole=layout.divides)
    stats = None  # a single head needs none, because scores and weights have the same order
    if layout.group_size > 1:
        is_whole = layout.num_chunks == 1
        stats = [_stats(s, is_candidate) for s in by_head] if is_whole else _load_stats(given.stats, b, j)
    weights = _pool(by_head, stats, is_candidate)
    if layout.dilate:
        before = _score(given, b, j, slots - 1, is_whole=False)
        weights = jnp.maximum(weights, _pool(before, stats, _is_candidate(given, b, slots - 1)))
    return jnp.where(is_candidate, _sortable(weights), 0), slots


def _slots_of(layout: _Layout, chunk: Array) -> Array:
    return chunk * layout.tiles.block + jnp.arange(layout.tiles.block, dtype=jnp.int32)


def _is_candidate(given: _Given, b: Array, slots: Array) -> Array:
    return (slots >= given.bounds[FIRST, b]) & (slots < given.bounds[LAST, b])


def _score(given: _Given, b: Array, j: Array, slots: Array, *, is_whole: bool) -> list[Array]:
    """The scores of each of the list's query heads. Where a slot does not compete they may be anything.

    Args:
        given, b, j: the inputs and the list.
        slots: the slots that are scored.
        is_whole: whether all slots lie in the cache. The loads then have no mask, which would make them narrow.
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
        """Adds channel r, or the two channels that share byte r, to each head's q . code."""
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
    """The peak and the sum of exponentials of a head's scores over these slots."""
    peak = jnp.where(is_candidate, scores, MASKED).max()
    return peak, jnp.where(is_candidate, jnp.exp(scores - peak), 0).sum()


def _load_stats(stats_ref, b: Array, j: Array) -> list[tuple[Array, Array]]:
    """`_stats` over all chunks, for each of the list's heads."""
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
    """The weight of each slot: its softmaxed scores, summed over heads. -inf where the slot does not compete."""
    weights = by_head
    if stats is not None:
        weights = [jnp.exp(scores - peak) / total for scores, (peak, total) in zip(by_head, stats, strict=True)]
    return jnp.where(is_candidate, sum(weights[1:], weights[0]), -jnp.inf)


def _sortable(scores: Float[Array, "slots"]) -> Array:
    """uint32 numbers above 0 in the order of the float32 scores. Both zeros are one number."""
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


class _Output(NamedTuple):
    """One array that the choice is written to."""

    at: Callable[[Array], Any]  # the reference to a place of it
    load: Callable[[Array | int], Array]  # the values of a block, loaded as late as possible, to save registers
    filling: int  # the value of places that are left over


def _write_chosen(
    load_order: Callable[[Array | int], Array], num_blocks: int, allowed: Array | int, size: int, *outputs: _Output
) -> None:
    """Writes the values of the `allowed` highest candidates, in the order of their slots. Ties go to the lower slot.

    Args:
        load_order: numbers in the order of a block's candidates; 0 is no candidate. A single block is loaded once and
            stays in registers. Several blocks are loaded anew for each bit.
        num_blocks: the number of blocks.
        allowed: how many candidates may be chosen.
        size: the places of an output.
        outputs: where the values are written.
    """
    if num_blocks == 1:
        order = load_order(0)
        load_order = lambda _: order  # noqa: E731
    wanted = jnp.minimum(allowed, _count(load_order, num_blocks, lambda order: order > 0))

    def raise_bit(index: Array, least: Array) -> Array:
        higher = least | jnp.uint32(1) << (31 - index).astype(jnp.uint32)
        return jnp.where(_count(load_order, num_blocks, lambda order: order >= higher) >= wanted, higher, least)

    threshold = lax.fori_loop(0, 32, raise_bit, jnp.uint32(0))
    missing = wanted - _count(load_order, num_blocks, lambda order: order > threshold)

    def write(block: Array | int, before: tuple[Array, Array]) -> tuple[Array, Array]:
        num_tied, num_listed = before
        order = load_order(block)
        is_tied = (order == threshold) & (order > 0)
        ties = num_tied + jnp.cumsum(is_tied.astype(jnp.int32))
        is_listed = (order > threshold) | (is_tied & (ties <= missing))
        place = num_listed + jnp.cumsum(is_listed.astype(jnp.int32)) - 1
        for output in outputs:
            # Lanes that write nothing point past the end. Otherwise the interpreter would have them write old values.
            plgpu.store(output.at(jnp.where(is_listed, place, size)), output.load(block), mask=is_listed)
        return num_tied + is_tied.astype(jnp.int32).sum(), num_listed + is_listed.astype(jnp.int32).sum()

    _loop(num_blocks, write, (jnp.int32(0), jnp.int32(0)))
    rest = jnp.arange(pl.next_power_of_2(size), dtype=jnp.int32)
    is_rest = (rest >= wanted) & (rest < size)
    for output in outputs:
        at = output.at(jnp.where(is_rest, rest, size))
        plgpu.store(at, jnp.full(rest.shape, output.filling, jnp.int32), mask=is_rest)


def _count(load_order: Callable[[Array | int], Array], num_blocks: int, is_counted: Callable[[Array], Array]) -> Array:
    """How many candidates of all blocks are counted."""

    def add(block: Array | int, total: Array) -> Array:
        return total + is_counted(load_order(block)).astype(jnp.int32).sum()

    return _loop(num_blocks, add, jnp.int32(0))


def _loop(count: int, body: Callable, carry: Any) -> Any:
    """`lax.fori_loop` from 0; a single round is no loop."""
    return body(0, carry) if count == 1 else lax.fori_loop(0, count, body, carry)
