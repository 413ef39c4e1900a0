"""Prefill attention in Triton: the code that runs on the GPU. `triton_prefill` calls it.

One program attends with a block of queries of one head to the slots that they see, block by block (FlashAttention-2,
arXiv 2307.08691). A second kernel goes the other way: one program takes a block of slots and adds up the attention that
the slots receive. Names in capitals are static.
"""

import triton.language as tl  # pyright: ignore[reportMissingImports]

from hshare_jax.kernels.triton_attention_kernels import LOG2_E, MASKED, load_rows, products, weighted
from hshare_jax.kernels.triton_library import jit


@jit
def attend_prompt(
    q,  # [B, T, N, H]
    keys,  # [B, K, S, H]
    key_scales,  # [B, K, S]; None unless the cache has 8 bits
    values,  # as the keys
    value_scales,
    starts,  # [B]
    out,  # [B, T, N, H]
    log_total,  # [B, N, T]
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    WINDOW: tl.constexpr,  # 0 without a window
    QUERIES: tl.constexpr,
    WIDTH: tl.constexpr,  # H, rounded up to what a dot takes
    BLOCK: tl.constexpr,
):
    """One program: one block of the queries of head n of row b."""
    n, b = tl.program_id(1), tl.program_id(2)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES  # the queries that see most begin first
    token, columns = first + tl.arange(0, QUERIES), tl.arange(0, WIDTH)
    is_query = (token < T)[:, None] & (columns < H)[None, :]
    at = ((b * T + token) * N + n)[:, None].to(tl.int64) * H + columns[None, :]
    query = tl.load(q + at, mask=is_query, other=0)
    start = tl.load(starts + b)
    lowest, highest = start + first, start + tl.minimum(first + QUERIES, T) - 1
    first_row = (b * K + n // (N // K)).to(tl.int64) * S
    # Blocks [begin, end) hold what some query sees, and blocks [whole, part) what all of them see.
    end = tl.minimum(tl.cdiv(highest + 1, BLOCK), tl.cdiv(S, BLOCK))
    begin = end * 0
    whole = begin
    if WINDOW > 0:
        begin = tl.minimum(tl.maximum(lowest - WINDOW + 1, 0) // BLOCK, end)
        whole = tl.minimum(tl.cdiv(tl.maximum(highest - WINDOW + 1, 0), BLOCK), end)
    part = tl.maximum(tl.minimum(tl.maximum(lowest + 1, 0) // BLOCK, tl.minimum(S // BLOCK, end)), whole)
    sums = tl.zeros([QUERIES, WIDTH], tl.float32)
    peak = tl.full([QUERIES], MASKED, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    if WINDOW > 0:
        for block in range(begin, whole):
            sums, peak, total = _read_block(
                sums, peak, total, block, query, start + token, keys, key_scales, values, value_scales, first_row,
                True, S, H, WINDOW, QUERIES, WIDTH, BLOCK,
            )  # fmt: skip
    for block in range(whole, part):
        sums, peak, total = _read_block(
            sums, peak, total, block, query, start + token, keys, key_scales, values, value_scales, first_row,
            False, S, H, WINDOW, QUERIES, WIDTH, BLOCK,
        )  # fmt: skip
    for block in range(part, end):
        sums, peak, total = _read_block(
            sums, peak, total, block, query, start + token, keys, key_scales, values, value_scales, first_row,
            True, S, H, WINDOW, QUERIES, WIDTH, BLOCK,
        )  # fmt: skip
    total = tl.where(total == 0, 1.0, total)  # of a query that read no block
    tl.store(out + at, (sums / total[:, None]).to(out.dtype.element_ty), mask=is_query)
    tl.store(log_total + (b * N + n) * T + token, (peak + tl.log2(total)) / LOG2_E, mask=token < T)


@jit
def _read_block(
    sums, peak, total, block, query, positions, keys, key_scales, values, value_scales, first_row,
    IS_MASKED: tl.constexpr, S: tl.constexpr, H: tl.constexpr, WINDOW: tl.constexpr, QUERIES: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The online softmax (arXiv 1805.02867) of all queries, with one more block of slots."""
    SCALE: tl.constexpr = H**-0.5
    slots = block * BLOCK + tl.arange(0, BLOCK)
    is_slot = slots < S
    key = load_rows(keys, first_row, slots, is_slot, H, WIDTH)
    value = load_rows(values, first_row, slots, is_slot, H, WIDTH)
    scores = products(query, key, key_scales, first_row, slots, is_slot, QUERIES) * (SCALE * LOG2_E)
    if IS_MASKED:
        scores = tl.where(_sees(positions, slots, WINDOW), scores, MASKED)
    # A query may see no slot of its first blocks. Their weights of 1 vanish with the first real peak.
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    weights, shrink = tl.exp2(scores - new_peak[:, None]), tl.exp2(peak - new_peak)
    read = weighted(weights, value, value_scales, first_row, slots, is_slot, query, QUERIES)
    return sums * shrink[:, None] + read, new_peak, total * shrink + tl.sum(weights, axis=1)


@jit
def _sees(positions, slots, WINDOW: tl.constexpr):
    """Which slots each query sees, as `reference_prefill.sees` says."""
    is_seen = slots[None, :] <= positions[:, None]
    if WINDOW > 0:
        is_seen = is_seen & (slots[None, :] > positions[:, None] - WINDOW)
    return is_seen


@jit
def receive(
    q,  # [B, T, N, H]
    keys,  # [B, K, S, H]
    key_scales,  # [B, K, S]; None unless the cache has 8 bits
    starts,  # [B]
    is_counted,  # [B, T] int8
    log_total,  # [B, N, T]
    out,  # [B, N, S]
    T: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    H: tl.constexpr,
    WINDOW: tl.constexpr,
    QUERIES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one block of the slots that head n of row b sees."""
    SCALE: tl.constexpr = H**-0.5
    index, n, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slots, columns = index * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    first_row, is_slot = (b * K + n // (N // K)).to(tl.int64) * S, slots < S
    key = load_rows(keys, first_row, slots, is_slot, H, WIDTH)
    start = tl.load(starts + b)
    # The queries [first, last) see some of the slots.
    first = tl.minimum(tl.maximum(index * BLOCK - start, 0), T)
    last = first * 0 + T
    if WINDOW > 0:
        last = tl.maximum(tl.minimum((index + 1) * BLOCK - 1 + WINDOW - start, T), 0)
    received = tl.zeros([BLOCK], tl.float32)
    for turn in range(first // QUERIES, tl.cdiv(last, QUERIES)):
        token = turn * QUERIES + tl.arange(0, QUERIES)
        is_token = token < T
        at = ((b * T + token) * N + n)[:, None].to(tl.int64) * H + columns[None, :]
        query = tl.load(q + at, mask=is_token[:, None] & (columns < H)[None, :], other=0)
        log_of_all = tl.load(log_total + (b * N + n) * T + token, mask=is_token, other=0)
        is_added = tl.load(is_counted + b * T + token, mask=is_token, other=0) != 0
        scores = products(query, key, key_scales, first_row, slots, is_slot, QUERIES) * SCALE
        weights = tl.exp2((scores - log_of_all[:, None]) * LOG2_E)
        is_added = _sees(start + token, slots, WINDOW) & is_added[:, None]
        received += tl.sum(tl.where(is_added, weights, 0.0), axis=0)
    tl.store(out + (b * N + n).to(tl.int64) * S + slots, received, mask=is_slot)
