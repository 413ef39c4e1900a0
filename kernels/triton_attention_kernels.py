"""Decode attention in Triton: the code that runs on the GPU. `triton_attention` calls it.

One program reads the slots of one list, or a part (split-K, as in Flash-Decoding), for all query heads that the list
serves. Names in capitals are static. Scores are in powers of two, because the hardware has exp2.
"""

import triton.language as tl  # pyright: ignore[reportMissingImports]

from hshare_jax.kernels import masked_softmax, tail
from hshare_jax.kernels.triton_library import jit

LOG2_E = tl.constexpr(masked_softmax.LOG2_E)
MASKED = tl.constexpr(masked_softmax.MASKED)
MAX_FEATURE = tl.constexpr(tail.MAX_FEATURE)
NUM_TERMS = tl.constexpr(tail.NUM_TERMS)
CONSTANT, OF_TOTAL, OF_MEAN = tl.constexpr(tail.CONSTANT), tl.constexpr(tail.OF_TOTAL), tl.constexpr(tail.OF_MEAN)
LOW, HIGH, FOLLOW = tl.constexpr(tail.LOW), tl.constexpr(tail.HIGH), tl.constexpr(tail.FOLLOW)


@jit
def attend(
    q,  # [B, N, H]
    keys,  # [B, K, S, H]
    key_scales,  # [B, K, S]; None unless the cache has 8 bits
    values,  # as the keys
    value_scales,
    lists,  # [L, B, J, C]; None where C is 0
    source,  # [B, L, J]; None where C is 0
    layer,  # [1]; None where C is 0
    marks,  # [B, J, S] int8: only slots with the mark WANTED are read; None reads all
    lengths,  # [B]
    start,  # [B], the recent range's first slot
    tail_keys,  # [B, N, TAIL, H]; None where TAIL is 0
    tail_values,  # [B, N, TAIL, H]
    tail_terms,  # [B, N, 5 + TAIL]
    out,  # [B, N, SPLITS, H]
    log_total,  # [B, N, SPLITS], log2 of the sum that the softmax divides by
    score_sum,  # [B, N, SPLITS], the sum of the scores; None where nobody reads it
    num_read,  # [B, J, SPLITS], how many slots were read; None where nobody reads it
    N: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
    J: tl.constexpr,
    C: tl.constexpr,
    NUM_SINKS: tl.constexpr,
    WINDOW: tl.constexpr,  # S without a window
    WANTED: tl.constexpr,
    TAIL: tl.constexpr,  # virtual tokens of a head; 0 without a tail
    HEADS: tl.constexpr,  # the heads of a list, rounded up to what a dot takes
    WIDTH: tl.constexpr,  # H, rounded up likewise
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program: one split of the slots of list j of row b, for all heads that the list serves."""
    split, j, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = N // J
    SCALE: tl.constexpr = H**-0.5
    row_and_head = (b * K + j // (J // K)).to(tl.int64)
    length = tl.load(lengths + b)
    list_end = tl.load(start + b)  # sinks and list are read before it
    first = tl.maximum(length - WINDOW, 0)
    recent_start = tl.maximum(list_end, first)
    columns = tl.arange(0, WIDTH)
    heads = tl.arange(0, HEADS)
    is_head = heads < GROUP
    head = b * N + j * GROUP + heads  # among those of all rows
    is_query = is_head[:, None] & (columns[None, :] < H)
    query = tl.load(q + head[:, None] * H + columns[None, :], mask=is_query, other=0)
    if C > 0:
        unit = tl.load(source + (b * L + tl.load(layer)) * J + j)
        unit = tl.minimum(tl.maximum(unit, 0), L * J - 1)  # a wrong plan reads a wrong list, and nothing else
        listed_slots = lists + ((unit // J * tl.num_programs(2) + b) * J + unit % J).to(tl.int64) * C

    sums = tl.zeros([HEADS, WIDTH], tl.float32)  # an online softmax (arXiv 1805.02867): the weighted sum of the values,
    peak = tl.full([HEADS], MASKED, tl.float32)  # the highest score,
    total = tl.zeros([HEADS], tl.float32)  # and the sum of the weights
    sum_of_scores = tl.zeros([HEADS], tl.float32)
    count = 0
    num_blocks = tl.cdiv(NUM_SINKS + C + tl.maximum(length - recent_start, 0), BLOCK)
    share = tl.cdiv(num_blocks, SPLITS)
    for block in range(split * share, tl.minimum((split + 1) * share, num_blocks)):
        # A program's places are the sinks, then the places of the list, then the recent range.
        place = block * BLOCK + tl.arange(0, BLOCK)
        is_sink = place < NUM_SINKS
        slots = tl.where(is_sink, place, recent_start + place - (NUM_SINKS + C))
        is_read = slots < tl.where(is_sink, list_end, length)
        if C > 0:
            is_listed = (place >= NUM_SINKS) & (place < NUM_SINKS + C)
            listed = tl.load(listed_slots + place - NUM_SINKS, mask=is_listed, other=-1)
            slots = tl.where(is_listed, listed, slots)
            is_read = tl.where(is_listed, (listed >= 0) & (listed < list_end), is_read)
        is_read = is_read & (slots >= first) & (slots < S)
        if marks is not None:
            marked = tl.load(marks + (b * J + j).to(tl.int64) * S + slots, mask=is_read, other=-1)
            is_read = is_read & (marked == WANTED)
        # Both loads come before the first use, so that twice as much is under way.
        key = load_rows(keys, row_and_head * S, slots, is_read, H, WIDTH)
        value = load_rows(values, row_and_head * S, slots, is_read, H, WIDTH)
        scores = products(query, key, key_scales, row_and_head * S, slots, is_read, HEADS) * (SCALE * LOG2_E)
        if score_sum is not None or TAIL > 0:
            sum_of_scores += tl.sum(tl.where(is_read[None, :], scores, 0.0), axis=1)
            count += tl.sum(is_read.to(tl.int32), axis=0)
        scores = tl.where(is_read[None, :], scores, MASKED)
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.where(is_read[None, :], tl.exp2(scores - new_peak[:, None]), 0.0)
        shrink = tl.exp2(peak - new_peak)
        read = weighted(weights, value, value_scales, row_and_head * S, slots, is_read, query, HEADS)
        sums = sums * shrink[:, None] + read
        total = total * shrink + tl.sum(weights, axis=1)
        peak = new_peak

    divisor = tl.where(total > 0, total, 1.0)
    result = sums / divisor[:, None]
    logs = tl.where(total > 0, peak + tl.log2(divisor), MASKED)
    if TAIL > 0 and score_sum is None:
        num_seen = tl.minimum(length, WINDOW)
        result = _add_tail(
            result, logs, sum_of_scores, count, num_seen, query, tail_keys, tail_values, tail_terms,
            head, is_head, TAIL, H, WIDTH,
        )  # fmt: skip
    at = head * SPLITS + split
    tl.store(out + at[:, None] * H + columns[None, :], result.to(out.dtype.element_ty), mask=is_query)
    tl.store(log_total + at, logs, mask=is_head)
    if score_sum is not None:
        tl.store(score_sum + at, sum_of_scores, mask=is_head)
        tl.store(num_read + (b * J + j) * SPLITS + split, count)


@jit
def load_rows(rows, first, slots, is_read, H: tl.constexpr, WIDTH: tl.constexpr):
    """Cached rows [BLOCK, WIDTH], zeros for a slot that is not read; `first` is the row of slot 0."""
    columns = tl.arange(0, WIDTH)
    at = rows + first * H + slots[:, None] * H + columns[None, :]
    return tl.load(at, mask=is_read[:, None] & (columns[None, :] < H), other=0)


@jit
def products(query, key, scales, first, slots, is_read, HEADS: tl.constexpr):
    """The products q . k [HEADS, BLOCK] of all queries and keys. Float32 is not rounded to TensorFloat-32.

    `scales` are those of a cache in 8 bits, or None; `first`, `slots` and `is_read` are as for `load_rows`.
    """
    key = key.to(query.dtype)
    if HEADS == 1:  # one query per key is no work for a tensor core
        scores = tl.sum(query.to(tl.float32) * key.to(tl.float32), axis=1)[None, :]
    else:
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    if scales is not None:
        scores = scores * tl.load(scales + first + slots, mask=is_read, other=0)[None, :]
    return scores


@jit
def weighted(weights, value, scales, first, slots, is_read, query, HEADS: tl.constexpr):
    """The sum [HEADS, WIDTH] of the values by weight. Codes of 8 bits become numbers like the query's."""
    if scales is None:
        return _sum_values(weights, value, HEADS)
    else:
        # Float16 does not hold small numbers, so weights are multiplied by shares of the largest scale.
        scale = tl.load(scales + first + slots, mask=is_read, other=0)
        largest = tl.max(scale, axis=0)
        shares = scale / tl.where(largest > 0, largest, 1.0)
        return _sum_values(weights * shares[None, :], value.to(query.dtype), HEADS) * largest


@jit
def _sum_values(weights, value, HEADS: tl.constexpr):
    if HEADS == 1:
        return tl.sum(tl.trans(weights) * value.to(tl.float32), axis=0)[None, :]
    else:
        return tl.dot(weights.to(value.dtype), value, input_precision="ieee")


@jit
def _add_tail(
    out, log_total, score_sum, num_read, num_seen, query, tail_keys, tail_values, tail_terms, head, is_head,
    TAIL: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`tail.add_tail` for the heads of a program: `out` is [heads, WIDTH], and numbers of each head are [heads].

    `log_total` is log2 of the sum that the softmax divided by; `score_sum` and `num_read` are of the slots that were
    read; `head` says which heads these are, among those of all rows.
    """
    SCALE: tl.constexpr = H**-0.5
    query = query.to(tl.float32) * SCALE
    terms = tail_terms + head * (NUM_TERMS + TAIL - 1)
    low = tl.load(terms + LOW, mask=is_head, other=0)
    high = tl.load(terms + HIGH, mask=is_head, other=0)
    follow = tl.load(terms + FOLLOW, mask=is_head, other=0)
    total = log_total / LOG2_E
    mean = score_sum / (LOG2_E * tl.maximum(num_read, 1))
    key = _load_virtual(tail_keys, head, 0, is_head, TAIL, H, WIDTH)
    weight = tl.load(terms + CONSTANT, mask=is_head, other=0) + tl.sum(query * key, axis=1)
    weight += tl.load(terms + OF_TOTAL, mask=is_head, other=0) * total
    weight += tl.load(terms + OF_MEAN, mask=is_head, other=0) * mean
    num_unread = num_seen - num_read
    weight = tl.minimum(tl.maximum(weight, low), high) + tl.log(tl.maximum(num_unread, 1).to(tl.float32))
    share = tl.where((num_unread > 0) & (high > MASKED), 1 / (1 + tl.exp(total - weight)), 0.0)
    value = _load_virtual(tail_values, head, 0, is_head, TAIL, H, WIDTH) + follow[:, None] * out
    for i in range(1, TAIL):
        key = _load_virtual(tail_keys, head, i, is_head, TAIL, H, WIDTH)
        feature = tl.sum(query * key, axis=1) - tl.load(terms + NUM_TERMS + i - 1, mask=is_head, other=0)
        feature = tl.minimum(tl.maximum(feature, -MAX_FEATURE), MAX_FEATURE)
        value += feature[:, None] * _load_virtual(tail_values, head, i, is_head, TAIL, H, WIDTH)
    return out + share[:, None] * (value - out)


@jit
def _load_virtual(tokens, head, i, is_head, TAIL: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr):
    """The key or value [heads, WIDTH] of each head's virtual token i, in float32."""
    columns = tl.arange(0, WIDTH)
    at = tokens + (head * TAIL + i)[:, None] * H + columns[None, :]
    return tl.load(at, mask=is_head[:, None] & (columns[None, :] < H), other=0).to(tl.float32)


@jit
def merge_splits(
    parts,  # [B, N, SPLITS, H], as `attend` writes them
    log_totals,  # [B, N, SPLITS]
    score_sums,  # [B, N, SPLITS]; None without a tail, as all that follows up to `tail_terms`
    num_reads,  # [B, J, SPLITS]
    lengths,  # [B]
    q,  # [B, N, H]
    tail_keys,  # [B, N, TAIL, H]
    tail_values,  # [B, N, TAIL, H]
    tail_terms,  # [B, N, 5 + TAIL]
    out,  # [B, N, H]
    N: tl.constexpr,
    H: tl.constexpr,
    J: tl.constexpr,
    WINDOW: tl.constexpr,
    TAIL: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program: the attention of head n of row b over the slots of all splits."""
    n, b = tl.program_id(0), tl.program_id(1)
    head = b * N + n
    split, columns = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    log_total = tl.load(log_totals + head * SPLITS + split)
    peak = tl.max(log_total, axis=0)
    weights = tl.exp2(log_total - peak)
    total = tl.sum(weights, axis=0)
    at = parts + (head * SPLITS + split)[:, None] * H + columns[None, :]
    of_splits = tl.load(at, mask=(split[:, None] >= 0) & (columns[None, :] < H), other=0)
    result = (tl.sum(weights[:, None] * of_splits, axis=0) / total)[None, :]
    one = head + tl.arange(0, 1)
    if TAIL > 0:
        score_sum = tl.sum(tl.load(score_sums + head * SPLITS + split), axis=0)
        num_read = tl.sum(tl.load(num_reads + (b * J + n // (N // J)) * SPLITS + split), axis=0)
        query = tl.load(q + one[:, None] * H + columns[None, :], mask=(columns < H)[None, :], other=0)
        num_seen = tl.minimum(tl.load(lengths + b), WINDOW)
        log_of_all = tl.full([1], 0.0, tl.float32) + peak + tl.log2(total)
        result = _add_tail(
            result, log_of_all, score_sum, num_read, num_seen, query, tail_keys, tail_values, tail_terms,
            one, one >= 0, TAIL, H, WIDTH,
        )  # fmt: skip
    tl.store(out + one[:, None] * H + columns[None, :], result.to(out.dtype.element_ty), mask=(columns < H)[None, :])
