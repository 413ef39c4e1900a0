"""Every implementation in the table that runs on this machine equals the definition.

A new implementation takes part as soon as it has a row. Pallas' kernels run in its interpreter, which is slow, so the
sizes are the smallest that matter.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from block_oracle import definition, random_nibbles
from tiny_decoder import HSHARE, MODEL, params, prefill_rows, random_rows, vary

from hshare_jax.decode_step import decode_step
from hshare_jax.errors import SettingError
from hshare_jax.kernels import api
from hshare_jax.kernels.block_weights import quantise_blocks
from hshare_jax.kernels.implementations import IMPLEMENTATIONS
from hshare_jax.kernels.int8_rows import quantise_rows
from hshare_jax.kernels.labels import label_query, make_labels
from hshare_jax.kernels.masked_softmax import MASKED
from hshare_jax.kernels.tail import HIGH, LOW, Tail
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.shapes import EMPTY

F32, BF16 = 1e-5, 2e-2  # absolute, on outputs of about 1
JUNK = 1e30  # fills slots that are not read; finite, and so are its products
S, C, NUM_SINKS, MAX_RECENT = 256, 20, 3, 7
# Rows with no token, one, a few, and a full cache. The recent range starts so that sinks, list and range all matter.
LENGTHS = np.array([0, 1, 31, 33, S], np.int32)
STARTS = np.maximum(LENGTHS - MAX_RECENT, 0).astype(np.int32)
B = len(LENGTHS)


def runs_here(impl):
    try:
        api.check_impl(impl)
    except SettingError:
        return False
    return True


every_implementation = pytest.mark.parametrize("impl", [impl for impl in IMPLEMENTATIONS if runs_here(impl)])
every_other_implementation = pytest.mark.parametrize(
    "impl", [impl for impl in IMPLEMENTATIONS if runs_here(impl) and impl != "reference"]
)


def test_the_definition_and_the_interpreted_kernels_run_everywhere():
    assert runs_here("reference")
    assert runs_here("interpret")


# --- appending

SLOTS = np.array([[0, 5, 39], [40, 41, 7], [-1, 2, -40], [2**31 - 1, -(2**31), 38]], np.int32)  # of 40; some outside
DTYPES = ["float32", "bfloat16", "float16"]


def written(T):
    """(row, token, slot) of the first T tokens of each row whose slot lies in the cache."""
    return [(b, t, SLOTS[b, t]) for b, t in np.ndindex(len(SLOTS), T) if 0 <= SLOTS[b, t] < 40]


def random_of(rng, dtype, *shape):
    return jnp.asarray(2 * rng.standard_normal(shape), dtype)


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 3])
def test_tokens_are_written_at_their_slots_and_nowhere_else(T, dtype, impl):
    rng = np.random.default_rng(20)
    keys, values, k, v = (
        random_of(rng, dtype, len(SLOTS), *rest) for rest in ((3, 40, 8), (3, 40, 8), (T, 3, 8), (T, 3, 8))
    )
    found = api.append_tokens(keys, values, k, v, jnp.asarray(SLOTS[:, :T]), impl=impl)
    for before, tokens, after in zip((keys, values), (k, v), found, strict=True):
        expected = np.array(before)
        for b, t, slot in written(T):
            expected[b, :, slot] = tokens[b, t]
        np.testing.assert_array_equal(after, expected)


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8, None])
@pytest.mark.parametrize(("T", "R"), [(1, 1), (1, 7), (3, 6)])
def test_labels_are_written_as_the_definition_makes_them_and_nowhere_else(T, R, bits, dtype, impl):
    rng, num_rows = np.random.default_rng(21), len(SLOTS)
    k, old = random_of(rng, dtype, num_rows, T, 3, 8), random_of(rng, dtype, num_rows, 3, 40, 8)
    channels = np.argsort(rng.random((num_rows, 2, 3, 8)), axis=-1)[..., :R]
    of_layer = jnp.asarray(channels[:, 1])
    before, new = make_labels(old, of_layer, bits), make_labels(k.swapaxes(1, 2), of_layer, bits)
    found = api.append_labels(before, 1, k, jnp.asarray(channels), jnp.asarray(SLOTS[:, :T]), bits=bits, impl=impl)
    for kept, one, after in zip(*map(jax.tree.leaves, (before, new, found)), strict=True):
        expected = np.array(kept)
        for b, t, slot in written(T):
            expected[b, ..., slot] = one[b, ..., t]
        np.testing.assert_array_equal(after, expected)
    read = oracle.read_labels(found.codes, found.scales, bits, R)
    for b, t, slot in written(T):
        for head in range(3):
            key = np.asarray(k[b, t, head, channels[b, 1, head]], np.float64)
            np.testing.assert_allclose(read[b, head, slot], oracle.quantised(key, bits, k.dtype.type), atol=F32, rtol=0)


@every_implementation
def test_what_is_appended_takes_the_dtype_of_the_cache(impl):
    rng, slots = np.random.default_rng(22), jnp.asarray([[3]])
    k, v, channels = random_of(rng, "float32", 1, 1, 2, 8), jnp.ones((1, 1, 2, 8)), jnp.arange(6).reshape(1, 1, 2, 3)
    empty = jnp.zeros((1, 2, 8, 8), jnp.bfloat16)
    keys, values = api.append_tokens(empty, empty, k, v, slots, impl=impl)
    assert keys.dtype == values.dtype == jnp.bfloat16
    np.testing.assert_array_equal(keys[0, :, 3], k[0, 0].astype(jnp.bfloat16))
    for bits in (4, None):
        before, of_cached = (make_labels(array, channels[:, 0], bits) for array in (empty, keys))
        found = api.append_labels(before, 0, k, channels, slots, bits=bits, impl=impl)
        for ours, defined in zip(jax.tree.leaves(found), jax.tree.leaves(of_cached), strict=True):
            np.testing.assert_array_equal(ours, defined)


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 3])
def test_tokens_in_8_bits_are_written_with_their_scales_and_nowhere_else(T, dtype, impl):
    rng = np.random.default_rng(23)
    k, v, *old = (random_of(rng, dtype, len(SLOTS), *rest) for rest in ((T, 3, 8), (T, 3, 8), (3, 40, 8), (3, 40, 8)))
    cache = keys, values = quantise_rows(old[0]), quantise_rows(old[1])
    found = api.append_tokens(keys, values, k, v, jnp.asarray(SLOTS[:, :T]), impl=impl)
    for before, tokens, after in zip(cache, (k, v), found, strict=True):
        codes, scales = np.array(before.qvalue), np.array(before.scale)
        for b, t, slot in written(T):
            rows = np.asarray(tokens[b, t], np.float32)
            scales[b, :, slot] = np.abs(rows).max(axis=-1) * np.float32(1 / 127)
            codes[b, :, slot] = np.round(rows * (1 / scales[b, :, slot, None]))
        np.testing.assert_array_equal(after.qvalue, codes)
        np.testing.assert_array_equal(after.scale, scales)
        assert after.dtype == dtype


# --- attention


def attention_case(seed, N, K, J, H):
    """(q, keys, values, lists, source) as NumPy arrays, with junk in the slots at and beyond each row's length."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((B, N, H)).astype(np.float32)
    keys, values = (rng.standard_normal((B, K, S, H)).astype(np.float32) for _ in range(2))
    lists = np.full((2, B, J, C), EMPTY, np.int32)
    for layer, b, j in np.ndindex(2, B, J):
        listed = rng.permutation(np.arange(NUM_SINKS, max(NUM_SINKS, int(STARTS[b]))))[: rng.integers(0, C + 1)]
        lists[layer, b, j, : len(listed)] = np.sort(listed)
    for b, length in enumerate(LENGTHS):
        keys[b, :, length:], values[b, :, length:] = JUNK, JUNK
    return q, keys, values, lists, rng.integers(0, 2 * J, (B, 2, J)).astype(np.int32)


def expected_attention(q, keys, values, reads_of):
    """The attention in float64; `reads_of(b, n)` are the slots that a head reads."""
    q, keys, values = (array.astype(np.float64) for array in (q, keys, values))
    reads = [[reads_of(b, n) for n in range(q.shape[1])] for b in range(B)]
    return np.stack([oracle.attention(q[b], keys[b], values[b], reads[b]) for b in range(B)])


# (N, K, J, H, window, min_length): multi-head, grouped with a list per kv head and per query head, multi-query
CASES = [(4, 4, 4, 64, None, 0), (8, 2, 2, 128, 20, 0), (4, 2, 4, 80, None, 33), (6, 1, 1, 96, 20, 33)]


@every_implementation
@pytest.mark.parametrize(("N", "K", "J", "H", "window", "min_length"), CASES)
def test_sparse_decode_equals_the_oracle(N, K, J, H, window, min_length, impl):
    q, keys, values, lists, source = attention_case(1, N, K, J, H)
    arrays = map(jnp.asarray, (q, keys, values, lists, source))
    decode = functools.partial(api.sparse_decode, *arrays, layer=1, num_sinks=NUM_SINKS, max_recent=MAX_RECENT)
    lengths, starts = jnp.asarray(LENGTHS), jnp.asarray(STARTS)
    out = decode(lengths=lengths, recent_start=starts, window=window, min_length=min_length, impl=impl)

    def reads_of(b, n):
        seen, unit = oracle.dense_reads(int(LENGTHS[b]), window), source[b, 1, n * J // N]
        if LENGTHS[b] < min_length:
            return seen
        return oracle.shared_reads(lists[unit // J, b, unit % J].tolist(), NUM_SINKS, int(STARTS[b]), seen)

    np.testing.assert_allclose(out, expected_attention(q, keys, values, reads_of), atol=F32, rtol=0)


WITHOUT = 3  # the row whose heads have no tail


def tail_case(seed, N, H, rank, dtype=jnp.float32):
    """Tails that weigh about as much as what is read, with bounds that hold some of them back."""
    rng = np.random.default_rng(seed)
    keys, values = (jnp.asarray(rng.standard_normal((B, N, 1 + rank, H)), dtype) for _ in range(2))
    terms = rng.standard_normal((B, N, 6 + rank)).astype(np.float32)
    terms[..., LOW], terms[..., HIGH] = -1, 1
    terms[WITHOUT, :, LOW : HIGH + 1] = MASKED
    return Tail(keys, values, jnp.asarray(terms))


@every_implementation
@pytest.mark.parametrize(
    ("N", "K", "J", "H", "window", "min_length", "rank"),
    [(4, 4, 4, 16, None, 0, 0), (8, 2, 2, 32, 20, 0, 2), (4, 2, 4, 24, None, 33, 2)],
)
def test_a_tail_stands_for_the_slots_that_are_not_read(N, K, J, H, window, min_length, rank, impl):
    q, keys, values, lists, source = attention_case(5, N, K, J, H)
    tail, arrays = tail_case(6, N, H, rank), map(jnp.asarray, (q, keys, values, lists, source))
    decode = functools.partial(
        api.sparse_decode, *arrays, layer=1, lengths=jnp.asarray(LENGTHS), recent_start=jnp.asarray(STARTS),
        num_sinks=NUM_SINKS, max_recent=MAX_RECENT, window=window, min_length=min_length, impl=impl,
    )  # fmt: skip
    out, without = np.asarray(decode(tail=tail)), np.asarray(decode())

    expected, is_same = np.zeros(q.shape), np.zeros((B, N), bool)
    q, keys, values, *of_tail = (np.asarray(x, np.float64) for x in (q, keys, values, *jax.tree.leaves(tail)))
    for b, length in enumerate(LENGTHS):
        seen, reads = oracle.dense_reads(int(length), window), []
        for n in range(N):
            unit = source[b, 1, n * J // N]
            shared = oracle.shared_reads(lists[unit // J, b, unit % J].tolist(), NUM_SINKS, int(STARTS[b]), seen)
            reads.append(seen if length < min_length else shared)
            is_same[b, n] = reads[n] == seen or b == WITHOUT
        expected[b] = oracle.attention_with_tail(q[b], keys[b], values[b], reads, seen, *(x[b] for x in of_tail))
    np.testing.assert_allclose(out, expected, atol=F32, rtol=0)
    np.testing.assert_array_equal(out[is_same], without[is_same])
    assert is_same[:2].all()
    assert (np.abs(out - without).max(axis=-1)[~is_same] > 1e-3).all(), "these heads have a tail that changes something"


@every_implementation
@pytest.mark.parametrize(("N", "K", "J", "H", "window"), [(4, 2, 4, 24, None), (8, 2, 2, 64, 20)])
def test_what_lists_read_and_what_they_leave_equal_the_oracle(N, K, J, H, window, impl):
    q, keys, values, lists, _ = attention_case(7, N, K, J, H)
    arrays = map(jnp.asarray, (q, keys, values, lists[0], LENGTHS, STARTS))
    parts = api.split_decode(*arrays, num_sinks=NUM_SINKS, window=window, impl=impl)
    q, keys, values = (array.astype(np.float64) for array in (q, keys, values))
    for b, length in enumerate(LENGTHS):
        seen = oracle.dense_reads(int(length), window)
        read = [
            oracle.shared_reads(lists[0, b, n * J // N].tolist(), NUM_SINKS, int(STARTS[b]), seen) for n in range(N)
        ]
        for part, slots in zip(parts, (read, [seen - of_head for of_head in read]), strict=True):
            assert part.count[b].tolist() == [len(of_head) for of_head in slots]
            expected = oracle.attention(q[b], keys[b], values[b], slots)
            np.testing.assert_allclose(part.out[b], expected, atol=F32, rtol=0)
            for n, of_head in enumerate(slots):
                scores = keys[b, n // (N // K), sorted(of_head)] @ q[b, n] / np.sqrt(H)
                total, mean = (np.log(np.exp(scores).sum()), scores.mean()) if of_head else (MASKED, 0)
                np.testing.assert_allclose([part.total[b, n], part.mean[b, n]], [total, mean], atol=F32, rtol=1e-6)


@every_implementation
@pytest.mark.parametrize(("N", "K", "H"), [(4, 4, 64), (8, 2, 80)])
@pytest.mark.parametrize("window", [None, 20])
def test_dense_decode_equals_the_oracle(N, K, H, window, impl):
    q, keys, values, *_ = attention_case(2, N, K, K, H)
    out = api.dense_decode(*map(jnp.asarray, (q, keys, values, LENGTHS)), window=window, impl=impl)
    expected = expected_attention(q, keys, values, lambda b, n: oracle.dense_reads(int(LENGTHS[b]), window))
    np.testing.assert_allclose(out, expected, atol=F32, rtol=0)


@every_other_implementation
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("min_length", "rank"), [(0, None), (40, None), (40, 2)])
def test_low_precision_equals_the_reference_also_with_a_length_gate_and_a_tail(dtype, min_length, rank, impl):
    q, keys, values, lists, source = attention_case(3, 8, 2, 2, 64)
    cache = [np.where(array == JUNK, 0, array) for array in (keys, values)]
    arrays = [jnp.asarray(array, dtype) for array in (q, *cache)]
    decode = functools.partial(
        api.sparse_decode, *arrays, *map(jnp.asarray, (lists, source)), layer=1, lengths=jnp.asarray(LENGTHS),
        recent_start=jnp.asarray(STARTS), num_sinks=NUM_SINKS, max_recent=MAX_RECENT, min_length=min_length,
        tail=None if rank is None else tail_case(6, 8, 64, rank, dtype),
    )  # fmt: skip
    got, expected = (np.asarray(decode(impl=name), np.float32) for name in (impl, "reference"))
    np.testing.assert_allclose(got, expected, atol=BF16, rtol=0)


@every_implementation
def test_a_full_row_and_a_cache_of_another_type_are_served_alike(impl):
    q, keys, values, *_ = attention_case(4, 8, 2, 2, 8)
    cached, lengths = (jnp.asarray(q, jnp.bfloat16), jnp.asarray(keys), jnp.asarray(values)), jnp.asarray(LENGTHS)
    decode = functools.partial(api.dense_decode, *cached, impl=impl)
    out, over = decode(lengths=lengths), decode(lengths=jnp.where(lengths == S, S + 9, lengths))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(jnp.float32), over.astype(jnp.float32))


# --- selection

# Rows in which no slot competes, a few do, all do, those up to an end beyond the cache do; and a row that is not due.
RANGES = np.array([[0, 0], [NUM_SINKS, 12], [0, S], [40, S + 9], [NUM_SINKS, 200]])
IS_DUE = np.array([True, True, True, True, False])


@dataclasses.dataclass(frozen=True)
class Choice:
    """One case of selection. Its seed is one at which no two scores are so close that rounding could decide."""

    N: int
    K: int
    J: int
    bits: int | None = 4
    dilate: bool = False
    is_bounded: bool = False  # num_allowed is given
    seed: int = 0


CHOICES = {
    "multi-head, 4 bits": Choice(4, 4, 4),
    "grouped, 8 bits, bounded": Choice(4, 2, 2, bits=8, is_bounded=True),
    "grouped, not quantised, dilated": Choice(4, 2, 2, bits=None, dilate=True, seed=4),
    "per query head, bounded": Choice(4, 2, 4, is_bounded=True),
    "multi-head, dilated": Choice(2, 2, 2, dilate=True, seed=12),
    "multi-query": Choice(4, 1, 1),
}


def selection_case(choice, H=16):
    """(q, keys, lists, source, the further arguments) of a choice in layer 1 of two."""
    rng = np.random.default_rng(choice.seed)
    q, keys = rng.standard_normal((B, choice.N, H)), rng.standard_normal((B, choice.K, S, H))
    lists, J = rng.integers(0, 99, (2, B, choice.J, C)), choice.J
    source = np.tile(np.arange(2 * J).reshape(1, 2, J), (B, 1, 1))
    source[::2, 1, -1] = 0  # in every other row the last list is a copy
    allowed = jnp.asarray([C, 5, 11, 0, C], jnp.int32) if choice.is_bounded else None
    types = (jnp.float32, jnp.float32, jnp.int32, jnp.int32)
    arrays = [jnp.asarray(x, dtype) for x, dtype in zip((2 * q, keys, lists, source), types, strict=True)]
    first, last = jnp.asarray(RANGES[:, 0], jnp.int32), jnp.asarray(RANGES[:, 1], jnp.int32)
    return *arrays, (jnp.asarray(IS_DUE), first, last, allowed)


def expected_lists(choice, scores_of):
    """The lists in which those of layer 1 are chosen; `scores_of(q, keys, b)` are the scores [N, S] of a row."""
    q, keys, lists, source, (*_, allowed) = selection_case(choice)
    q, keys, expected = np.asarray(q, np.float64), np.asarray(keys, np.float64), np.array(lists)
    for b in np.flatnonzero(IS_DUE):
        candidates = set(range(RANGES[b, 0], min(RANGES[b, 1], S)))
        weights = oracle.pooled(scores_of(q[b], keys[b], b), candidates, choice.J)
        for j in range(choice.J):
            if source[b, 1, j] != choice.J + j:
                continue
            of_list = oracle.dilated(weights[j], candidates) if choice.dilate else weights[j]
            chosen = oracle.select(of_list, candidates, C if allowed is None else int(allowed[b]))
            others = candidates - set(chosen)
            if chosen and others:
                last = min(of_list[chosen])
                assert last - max(of_list[sorted(others)]) > F32 * abs(last), "rounding could decide: take another seed"
            expected[1, b, j] = chosen + [EMPTY] * (C - len(chosen))
    return expected


R = 7
CHANNELS = np.sort(np.argsort(np.random.default_rng(6).random((B, 4, 16)), axis=-1)[..., :R], axis=-1)


@functools.cache  # once for all implementations
def expected_by_labels(choice):
    channels = CHANNELS[:, : choice.K]
    return expected_lists(choice, lambda q, keys, b: oracle.label_scores(q, keys, channels[b], choice.bits))


@every_implementation
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_lists_chosen_by_labels_equal_the_oracle_where_they_are_asked_for(choice, impl):
    q, keys, lists, source, further = selection_case(choice)
    channels = jnp.asarray(CHANNELS[:, : choice.K], jnp.int32)
    query, labels = label_query(q, channels, choice.bits), make_labels(keys, channels, choice.bits)
    got = api.select_by_labels(lists, 1, query, labels, source, *further, dilate=choice.dilate, impl=impl)
    np.testing.assert_array_equal(got, expected_by_labels(choice))


@every_implementation
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_lists_chosen_by_keys_equal_the_oracle_where_they_are_asked_for(choice, impl):
    q, keys, lists, source, further = selection_case(choice)
    got = api.select_by_keys(lists, 1, q, keys, source, *further, dilate=choice.dilate, impl=impl)
    np.testing.assert_array_equal(got, expected_lists(choice, lambda q, keys, b: oracle.key_scores(q, keys)))


@every_implementation
def test_lists_stay_as_they_are_where_no_row_is_due(impl):
    q, keys, lists, source, (_, first, last, allowed) = selection_case(CHOICES["grouped, 8 bits, bounded"])
    nobody = jnp.zeros((B,), bool)
    got = api.select_by_keys(lists, 1, q, keys, source, nobody, first, last, allowed, impl=impl)
    np.testing.assert_array_equal(got, lists)


@every_implementation
@pytest.mark.parametrize(("N", "K", "J", "H", "window", "min_length"), [(8, 2, 2, 64, 20, 0), (4, 2, 4, 24, None, 33)])
def test_a_cache_in_8_bits_reads_as_the_floats_that_it_stands_for(N, K, J, H, window, min_length, impl):
    q, keys, values, lists, source = map(jnp.asarray, attention_case(8, N, K, J, H))
    bits, tail, T = (quantise_rows(keys), quantise_rows(values)), tail_case(9, N, H, 1), 5
    queries = jnp.tile(q[:, None], (1, T, 1, 1)) * jnp.arange(1, T + 1).reshape(1, T, 1, 1)
    starts, lengths = jnp.asarray(STARTS), jnp.asarray(LENGTHS)
    ranges = {"num_sinks": NUM_SINKS, "window": window}

    def outputs(keys, values, impl):
        sparse = ranges | {"max_recent": MAX_RECENT, "min_length": min_length, "tail": tail, "impl": impl}
        listed, first = lists[0], jnp.full(B, NUM_SINKS)
        told = [jax.tree.map(lambda array: array[2:], argument) for argument in (queries, keys, values, lengths - T)]
        return (
            api.dense_decode(q, keys, values, lengths, window=window, impl=impl),
            api.sparse_decode(q, keys, values, lists, source, 1, lengths, starts, **sparse),
            api.split_decode(q, keys, values, listed, lengths, starts, **ranges, impl=impl),
            api.prefill_attention_received(*told, is_counted=jnp.ones((B - 2, T), bool), window=window, impl=impl),
            api.select_by_keys(lists, 0, q, keys, source, jnp.ones(B, bool), first, starts, None, impl=impl),
        )

    found, expected = outputs(*bits, impl), outputs(bits[0].to_floats(), bits[1].to_floats(), "reference")
    for ours, defined in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, defined, atol=F32, rtol=F32)


# --- whole decodes


@every_other_implementation
@pytest.mark.parametrize(
    ("method", "kv_cache_dtype"),
    [
        # Without dilation, because it makes ties, which rounding may break differently here and there.
        (vary(HSHARE, dilate=False), "auto"),
        (vary(HSHARE, dilate=False, min_length=30, label_bits=None), "auto"),
        (vary(HSHARE, scoring="exact", dense_layers=0, lists_per="query_head"), "auto"),
        (vary(HSHARE, scoring="exact", dense_layers=0, pool=2, tail="fitted"), "int8"),
        (None, "auto"),
    ],
    ids=["labels", "gate, not quantised", "exact, per query head", "exact, pools, tails, 8 bits", "dense"],
)
def test_a_whole_decode_equals_that_of_the_reference(method, kv_cache_dtype, impl):
    config, rows = dataclasses.replace(MODEL, windows=(None, 20, None, None)), random_rows(7, more=5)
    found = []
    for name in (impl, "reference"):
        prompts, how = [row[:-5] for row in rows], {"method": method, "config": config}
        state = prefill_rows(prompts, **how, kv_cache_dtype=kv_cache_dtype)[1]
        logits = []
        for step in range(5):
            tokens = jnp.asarray([row[step - 5] for row in rows])
            out, state = decode_step(params(config), tokens, state, config=config, impl=name)
            logits.append(out)
        lists = state.method_state.token_indices if isinstance(state.method_state, SharedLists) else jnp.zeros(0)
        found.append((np.stack(logits), np.asarray(lists)))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-4, rtol=0)
    np.testing.assert_array_equal(found[0][1], found[1][1])


# --- projections

WIDTHS = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 2e-3}  # and the error that rounding allows, relative


@every_implementation
@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("kind", ["floats", "4 bits", "8 bits"])
@pytest.mark.parametrize("rows", [1, 3, 8, 40])
def test_projections_equal_the_definition_in_float64(rows, kind, dtype, impl):
    rng, out, D = np.random.default_rng(11), 37, 96
    weight = {
        "floats": lambda: jnp.asarray(rng.standard_normal((out, D)), dtype),
        "4 bits": lambda: random_nibbles(rng, out, D, dtype),
        "8 bits": lambda: quantise_blocks(rng.standard_normal((out, D)), np.dtype(dtype)),
    }[kind]()
    floats = np.asarray(weight if kind == "floats" else definition(weight), np.float64)
    x = jnp.asarray(rng.standard_normal((rows, 1, D)), dtype)
    found = api.project(jax.tree.map(jnp.asarray, weight), x, impl=impl)
    expected = np.asarray(x, np.float64) @ floats.T
    assert found.dtype == dtype
    atol = WIDTHS[dtype] * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0, atol=atol)
