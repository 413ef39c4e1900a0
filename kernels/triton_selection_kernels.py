"""The choice of critical tokens in Triton: the code that runs on the GPU. `triton_selection` calls it.

One program takes a chunk of the slots of one list. It keeps the weights in registers as integers of the same order,
finds the C-th highest by bisection of the bits, and writes the chosen slots in ascending order. Names in capitals are
static. A program whose list is not chosen leaves at once.
"""

import triton.language as tl  # pyright: ignore[reportMissingImports]

from hshare_jax import shapes
from hshare_jax.kernels import masked_softmax
from hshare_jax.kernels.triton_library import jit

EMPTY = tl.constexpr(shapes.EMPTY)
MASKED = tl.constexpr(masked_softmax.MASKED)
IS_DUE, FIRST, LAST, ALLOWED = (tl.constexpr(row) for row in range(4))  # the rows of `bounds`
NOTHING = tl.constexpr(-(2**31))  # in the order of the weights: a slot that does not compete
INFINITY = tl.constexpr(float("inf"))


@jit
def find_stats(
    query, codes, scales, source, layer, bounds,  # as in `choose`
    stats,  # [B, J, CHUNKS, 2, HEADS]
    N: tl.constexpr, K: tl.constexpr, S: tl.constexpr, R: tl.constexpr, CODES: tl.constexpr, L: tl.constexpr,
    J: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the peak and the sum of exponentials of each head's scores over a chunk."""
    chunk, j, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if _is_chosen(source, layer, bounds, j, b, L, J):
        slots = chunk * BLOCK + tl.arange(0, BLOCK)
        is_candidate = _is_candidate(bounds, slots, b)
        scores = _score(query, codes, scales, slots, j, b, N, K, S, R, CODES, J, HEADS, BLOCK)
        peak, total = _stats(scores, is_candidate)
        at = stats + ((b * J + j) * tl.num_programs(0) + chunk) * 2 * HEADS + tl.arange(0, HEADS)
        tl.store(at, peak)
        tl.store(at + HEADS, total)


@jit
def choose(
    weights,  # [B, J, S] float32, one weight per list and slot; or None, and instead of it
    query,  # [B, N, R] float32, and
    codes,  # the labels: [B, K, CODES, S]
    scales,  # [B, K, 2, S]; None if the labels are not quantised
    stats,  # [B, J, CHUNKS, 2, HEADS], from `find_stats`; None where one chunk is all, or a list serves one head
    source,  # [B, L, J]
    layer,  # [1]
    bounds,  # [4, B]
    lists,  # [L, B, J, KEPT], changed in place; None where there are several chunks, and instead of it
    best_slots,  # [B, J, CHUNKS * KEPT], the best slots of each chunk, and
    best_order,  # likewise, integers in the order of their weights
    N: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
    CODES: tl.constexpr,
    L: tl.constexpr,
    J: tl.constexpr,
    KEPT: tl.constexpr,
    DILATE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Writes the list of a cache that is a single chunk; or the best slots of a chunk."""
    chunk, j, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if _is_chosen(source, layer, bounds, j, b, L, J):
        slots = chunk * BLOCK + tl.arange(0, BLOCK)
        is_candidate = _is_candidate(bounds, slots, b)
        if weights is not None:
            is_read = is_candidate & (slots < S)
            found = tl.load(weights + (b * J + j).to(tl.int64) * S + slots, mask=is_read, other=-INFINITY)
        else:
            scores = _score(query, codes, scales, slots, j, b, N, K, S, R, CODES, J, HEADS, BLOCK)
            if N == J:  # scores and weights have the same order
                peak, total = tl.zeros([HEADS], tl.float32), tl.zeros([HEADS], tl.float32)
            elif stats is None:
                peak, total = _stats(scores, is_candidate)
            else:
                peak, total = _load_stats(stats, j, b, J, HEADS, CHUNKS)
            found = _pool(scores, peak, total, is_candidate, N // J)
            if DILATE:
                is_before = _is_candidate(bounds, slots - 1, b)
                before = _score(query, codes, scales, slots - 1, j, b, N, K, S, R, CODES, J, HEADS, BLOCK)
                found = tl.maximum(found, _pool(before, peak, total, is_before, N // J))
        order = tl.where(is_candidate, _sortable(found), NOTHING)
        if CHUNKS == 1:
            allowed = tl.load(bounds + ALLOWED * tl.num_programs(2) + b)
            into = lists + ((tl.load(layer) * tl.num_programs(2) + b) * J + j).to(tl.int64) * KEPT
            _write_chosen(order, slots, None, None, BLOCK, allowed, into, None, KEPT, BLOCK, 1)
        else:
            first = ((b * J + j) * CHUNKS + chunk) * KEPT
            _write_chosen(order, slots, None, None, BLOCK, KEPT, best_slots + first, best_order + first, KEPT, BLOCK, 1)


@jit
def choose_of_chunks(
    best_slots,  # [B, J, CANDIDATES], from `choose`
    best_order,
    source,  # [B, L, J]
    layer,  # [1]
    bounds,  # [4, B]
    lists,  # [L, B, J, C], changed in place
    L: tl.constexpr,
    J: tl.constexpr,
    C: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Writes a list from the best slots of all chunks. A single block stays in registers."""
    j, b = tl.program_id(1), tl.program_id(2)
    if _is_chosen(source, layer, bounds, j, b, L, J):
        slots_at, order_at = best_slots + (b * J + j) * CANDIDATES, best_order + (b * J + j) * CANDIDATES
        place = tl.arange(0, BLOCK)
        order = tl.load(order_at + place, mask=place < CANDIDATES, other=NOTHING)
        allowed = tl.load(bounds + ALLOWED * tl.num_programs(2) + b)
        into = lists + ((tl.load(layer) * tl.num_programs(2) + b) * J + j).to(tl.int64) * C
        _write_chosen(order, None, order_at, slots_at, CANDIDATES, allowed, into, None, C, BLOCK, BLOCKS)


@jit
def _is_chosen(source, layer, bounds, j, b, L: tl.constexpr, J: tl.constexpr):
    """Whether the list reads itself and its row is due."""
    number = tl.load(layer)
    is_own = tl.load(source + (b * L + number) * J + j) == number * J + j
    return is_own & (tl.load(bounds + IS_DUE * tl.num_programs(2) + b) != 0)


@jit
def _is_candidate(bounds, slots, b):
    """Which slots compete."""
    num_rows = tl.num_programs(2)
    return (slots >= tl.load(bounds + FIRST * num_rows + b)) & (slots < tl.load(bounds + LAST * num_rows + b))


@jit
def _score(
    query, codes, scales, slots, j, b, N: tl.constexpr, K: tl.constexpr, S: tl.constexpr, R: tl.constexpr,
    CODES: tl.constexpr, J: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The scores [HEADS, BLOCK] of the list's query heads on these slots. Outside the cache they may be anything."""
    is_slot = (slots >= 0) & (slots < S)
    heads = tl.arange(0, HEADS)
    is_head = heads < N // J
    of_heads = query + (b * N + j * (N // J) + heads) * R
    row_and_head = (b * K + j // (J // K)).to(tl.int64)
    scores = tl.zeros([HEADS, BLOCK], tl.float32)
    for r in range(CODES):
        code = tl.load(codes + (row_and_head * CODES + r) * S + slots, mask=is_slot, other=0)
        if CODES < R:  # two codes share a byte; in the last one the second may be missing
            low = tl.load(of_heads + r, mask=is_head, other=0)
            high = tl.load(of_heads + r + CODES, mask=is_head & (r + CODES < R), other=0)
            scores += low[:, None] * (code & 15).to(tl.float32)[None, :]
            scores += high[:, None] * (code >> 4).to(tl.float32)[None, :]
        else:
            scores += tl.load(of_heads + r, mask=is_head, other=0)[:, None] * code.to(tl.float32)[None, :]
    if scales is not None:  # q . (offset + step * code)
        sums = tl.zeros([HEADS], tl.float32)
        for r in range(R):
            sums += tl.load(of_heads + r, mask=is_head, other=0)
        at = scales + row_and_head * 2 * S + slots
        offset = tl.load(at, mask=is_slot, other=0).to(tl.float32)
        step = tl.load(at + S, mask=is_slot, other=0).to(tl.float32)
        scores = scores * step[None, :] + sums[:, None] * offset[None, :]
    return scores


@jit
def _stats(scores, is_candidate):
    """The peak and the sum of exponentials [HEADS] of each head's scores over these slots."""
    peak = tl.max(tl.where(is_candidate[None, :], scores, MASKED), axis=1)
    return peak, tl.sum(tl.where(is_candidate[None, :], tl.exp(scores - peak[:, None]), 0.0), axis=1)


@jit
def _load_stats(stats, j, b, J: tl.constexpr, HEADS: tl.constexpr, CHUNKS: tl.constexpr):
    """`_stats` over all chunks."""
    at = stats + (b * J + j) * CHUNKS * 2 * HEADS + tl.arange(0, HEADS)
    peak, total = tl.load(at), tl.load(at + HEADS)
    for chunk in range(1, CHUNKS):
        peak_here = tl.load(at + chunk * 2 * HEADS)
        new_peak = tl.maximum(peak, peak_here)
        total_here = tl.load(at + chunk * 2 * HEADS + HEADS) * tl.exp(peak_here - new_peak)
        total = total * tl.exp(peak - new_peak) + total_here
        peak = new_peak
    return peak, total


@jit
def _pool(scores, peak, total, is_candidate, GROUP: tl.constexpr):
    """The weight [BLOCK] of each slot: its softmaxed scores, summed over heads. -inf where a slot does not compete."""
    if GROUP == 1:
        weights = tl.sum(scores, axis=0)
    else:
        is_head = tl.arange(0, scores.shape[0]) < GROUP
        shares = tl.exp(scores - peak[:, None]) / total[:, None]
        weights = tl.sum(tl.where(is_head[:, None], shares, 0.0), axis=0)
    return tl.where(is_candidate, weights, -INFINITY)


@jit
def _sortable(weights):
    """int32 numbers in the order of the float32 weights, above NOTHING. Both zeros are one number."""
    bits = weights.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, NOTHING - bits, bits)  # sign and magnitude to two's complement


@jit
def _write_chosen(
    order, values, order_at, values_at, num_stored, allowed, into, order_into, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Writes the values of the `allowed` highest candidates, in their order of appearance. Ties go to the first.

    Args:
        order: numbers in the order of the candidates, NOTHING for none; of the first block.
        values: their values; or None, and they are loaded.
        order_at, values_at: where both lie in memory. The order is loaded anew only where there are several blocks.
        num_stored: how many there are.
        allowed: how many candidates may be chosen.
        into, order_into: where the values are written; and their order, unless it is None.
        SIZE: the places of an output. Those left over hold EMPTY, and NOTHING.
        BLOCK, BLOCKS: the size of a block, and their number.
    """
    wanted = tl.minimum(allowed, _count(order, order_at, num_stored, NOTHING + 1, BLOCK, BLOCKS))
    threshold = tl.where(_count(order, order_at, num_stored, 0, BLOCK, BLOCKS) >= wanted, 0, NOTHING)
    for index in range(31):
        higher = threshold | (1 << (30 - index))
        enough = _count(order, order_at, num_stored, higher, BLOCK, BLOCKS) >= wanted
        threshold = tl.where(enough, higher, threshold)
    # No weight has the greatest integer, so that 1 can be added.
    missing = wanted - _count(order, order_at, num_stored, tl.minimum(threshold, 2**31 - 2) + 1, BLOCK, BLOCKS)
    num_tied, num_listed = 0, 0
    for block in range(BLOCKS):
        if BLOCKS > 1:
            order = _load_block(order_at, block, num_stored, NOTHING, BLOCK)
        is_tied = (order == threshold) & (order != NOTHING)
        ties = num_tied + tl.cumsum(is_tied.to(tl.int32), axis=0)
        is_listed = (order > threshold) | (is_tied & (ties <= missing))
        place = num_listed + tl.cumsum(is_listed.to(tl.int32), axis=0) - 1
        if values is None:  # loaded as late as possible, to save registers
            tl.store(into + place, _load_block(values_at, block, num_stored, EMPTY, BLOCK), mask=is_listed)
        else:
            tl.store(into + place, values, mask=is_listed)
        if order_into is not None:
            tl.store(order_into + place, order, mask=is_listed)
        num_tied += tl.sum(is_tied.to(tl.int32), axis=0)
        num_listed += tl.sum(is_listed.to(tl.int32), axis=0)
    for first in range(0, SIZE, 128):
        rest = first + tl.arange(0, 128)
        is_rest = (rest >= wanted) & (rest < SIZE)
        tl.store(into + rest, tl.full([128], EMPTY, tl.int32), mask=is_rest)
        if order_into is not None:
            tl.store(order_into + rest, tl.full([128], NOTHING, tl.int32), mask=is_rest)


@jit
def _count(order, order_at, num_stored, least, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """How many numbers are at least `least`."""
    if BLOCKS == 1:
        return tl.sum((order >= least).to(tl.int32), axis=0)
    else:
        total = tl.zeros([BLOCK], tl.int32)
        for block in range(BLOCKS):
            total += (_load_block(order_at, block, num_stored, NOTHING, BLOCK) >= least).to(tl.int32)
        return tl.sum(total, axis=0)


@jit
def _load_block(numbers, block, num_stored, other, BLOCK: tl.constexpr):
    place = block * BLOCK + tl.arange(0, BLOCK)
    return tl.load(numbers + place, mask=place < num_stored, other=other)
