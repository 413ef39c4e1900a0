"""The reference attention equals a float64 oracle written from the definition, whatever other slots hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from hshare_jax.kernels import reference_attention, reference_prefill
from hshare_jax.shapes import EMPTY

F32 = 1e-5  # absolute, on outputs of about 1: float32 sums over a few hundred terms
JUNK = 1e30  # fills slots that are not read; finite, and so are its products
B, S, H = 6, 512, 8
dense_decode = jax.jit(reference_attention.dense_decode, static_argnames="window")
LAYER = 1
prefill_attention = jax.jit(reference_prefill.prefill_attention)
# (N, K): multi-head, grouped, multi-query, and an odd number of groups
HEADS = [(4, 4), (4, 2), (4, 1), (6, 3)]


@functools.partial(jax.jit, static_argnames=("num_sinks", "max_recent", "window"))
def sparse_decode(q, keys, values, lists, source, lengths, starts, *, num_sinks, max_recent, window=None):
    return reference_attention.sparse_decode(
        q, keys, values, lists, source, LAYER, lengths, starts,
        num_sinks=num_sinks, max_recent=max_recent, window=window,
    )  # fmt: skip


def cache(rng, K, lengths):
    """Keys and values [B, K, S, H], with junk in the slots at and beyond each row's length."""
    keys, values = (rng.standard_normal((len(lengths), K, S, H)).astype(np.float32) for _ in range(2))
    for b, length in enumerate(lengths):
        keys[b, :, length:], values[b, :, length:] = JUNK, JUNK
    return keys, values


def naive_low_precision(q, keys, values, reads):
    """Attention of one row, all of it in bfloat16, by the plainest code that one would write."""
    N, K = q.shape[0], keys.shape[0]
    is_read = np.zeros((N, keys.shape[1]), bool)
    for n, slots in enumerate(reads):
        is_read[n, sorted(slots)] = True
    keys, values = jnp.repeat(keys, N // K, axis=0), jnp.repeat(values, N // K, axis=0)
    scores = jnp.where(is_read, jnp.einsum("NH,NSH->NS", q, keys) * jnp.bfloat16(H**-0.5), -jnp.inf)
    return np.asarray(jnp.einsum("NS,NSH->NH", jax.nn.softmax(scores, axis=-1), values), np.float64)


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize(("N", "K"), HEADS)
def test_dense_decode_equals_the_definition(N, K, window):
    rng = np.random.default_rng(1)
    lengths = np.array([1, 2, 255, 256, 257, S])
    q = rng.standard_normal((B, N, H)).astype(np.float32)
    keys, values = cache(rng, K, lengths)
    out = dense_decode(*map(jnp.asarray, (q, keys, values, lengths)), window=window)
    for b, length in enumerate(lengths):
        expected = oracle.attention(q[b], keys[b], values[b], [oracle.dense_reads(length, window)] * N)
        np.testing.assert_allclose(out[b], expected, atol=F32, rtol=0)


def test_a_row_of_length_zero_returns_zeros():
    rng = np.random.default_rng(2)
    q, (keys, values) = rng.standard_normal((1, 4, H)).astype(np.float32), cache(rng, 2, [S])
    zero = jnp.zeros((1,), jnp.int32)
    assert (np.asarray(dense_decode(jnp.asarray(q), jnp.asarray(keys), jnp.asarray(values), zero)) == 0).all()
    lists, source = jnp.full((2, 1, 2, 3), EMPTY, jnp.int32), jnp.asarray([[[0, 1], [2, 3]]], jnp.int32)
    out = sparse_decode(
        jnp.asarray(q), jnp.asarray(keys), jnp.asarray(values), lists, source, zero, zero, num_sinks=2, max_recent=4
    )
    assert (np.asarray(out) == 0).all()


def sparse_case(rng, N, K, J, lengths, recent_starts, num_sinks, C):
    """(q, keys, values, lists [2, B, J, C], source [B, 2, J]) with random ascending lists, some of them short."""
    rows = len(lengths)
    lists = np.full((2, rows, J, C), EMPTY, np.int32)
    for layer, b, j in np.ndindex(2, rows, J):
        candidates = np.arange(num_sinks, max(num_sinks, recent_starts[b]))
        listed = np.sort(rng.permutation(candidates)[: rng.integers(0, C + 1)])
        lists[layer, b, j, : len(listed)] = listed
    source = rng.integers(0, 2 * J, (rows, 2, J)).astype(np.int32)
    q = rng.standard_normal((rows, N, H)).astype(np.float32)
    return q, *cache(rng, K, lengths), lists, source


def expected_sparse(q, keys, values, lists, source, lengths, starts, num_sinks, window):
    """The float64 outputs [B, N, H], and the slots that each head of each row reads."""
    N, J, out, reads = q.shape[1], source.shape[2], [], []
    for b in range(len(q)):
        flat = [source[b, LAYER, n * J // N] for n in range(N)]
        listed = [lists[f // J, b, f % J].tolist() for f in flat]
        seen = oracle.dense_reads(int(lengths[b]), window)
        reads.append([oracle.shared_reads(tokens, num_sinks, int(starts[b]), seen) for tokens in listed])
        out.append(oracle.attention(q[b].astype(np.float64), keys[b], values[b], reads[-1]))
    return np.stack(out), reads


# The rows have one token, as many as the sinks, a recent range that overlaps the sinks, one that touches them, one that
# has grown, and a full cache.
LENGTHS = np.array([1, 3, 6, 9, 300, S])
STARTS = np.array([0, 0, 2, 3, 293, S - 6])


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize(("N", "K", "J"), [(4, 4, 4), (4, 2, 2), (4, 2, 4), (4, 1, 4), (6, 3, 3), (6, 3, 6)])
def test_sparse_decode_equals_the_definition(N, K, J, window):
    rng = np.random.default_rng(3)
    q, keys, values, lists, source = sparse_case(rng, N, K, J, LENGTHS, STARTS, num_sinks=3, C=10)
    out = sparse_decode(
        *map(jnp.asarray, (q, keys, values, lists, source, LENGTHS, STARTS)), num_sinks=3, max_recent=7, window=window
    )
    expected, _ = expected_sparse(q, keys, values, lists, source, LENGTHS, STARTS, 3, window)
    np.testing.assert_allclose(out, expected, atol=F32, rtol=0)


def test_sparse_decode_from_slot_zero_is_dense():
    rng = np.random.default_rng(4)
    lengths = np.array([1, 5, 17])
    q, keys, values, lists, source = sparse_case(rng, 4, 2, 2, lengths, np.zeros(3, int), num_sinks=3, C=4)
    inputs = map(jnp.asarray, (q, keys, values, lists, source, lengths, np.zeros(3, np.int32)))
    out = sparse_decode(*inputs, num_sinks=3, max_recent=17)
    dense = dense_decode(*map(jnp.asarray, (q, keys, values, lengths)))
    np.testing.assert_allclose(out, dense, atol=F32, rtol=0)


def test_sparse_decode_without_sinks_reads_list_and_recent_tokens_only():
    rng = np.random.default_rng(5)
    q, keys, values, lists, source = sparse_case(rng, 4, 2, 2, LENGTHS, STARTS, num_sinks=0, C=5)
    inputs = map(jnp.asarray, (q, keys, values, lists, source, LENGTHS, STARTS))
    out = sparse_decode(*inputs, num_sinks=0, max_recent=7)
    expected, _ = expected_sparse(q, keys, values, lists, source, LENGTHS, STARTS, 0, None)
    np.testing.assert_allclose(out, expected, atol=F32, rtol=0)


@pytest.mark.parametrize("window", [None, 1])
def test_the_current_token_is_always_read_and_no_later_one(window):
    rng = np.random.default_rng(8)
    q, keys, values, lists, source = sparse_case(rng, 4, 2, 2, LENGTHS, STARTS, num_sinks=3, C=10)
    plan = [jnp.asarray(array) for array in (lists, source, LENGTHS, STARTS)]

    def read(keys, values):
        sparse = sparse_decode(
            jnp.asarray(q), jnp.asarray(keys), jnp.asarray(values), plan[0], plan[1], plan[2], plan[3],
            num_sinks=3, max_recent=7, window=window,
        )  # fmt: skip
        dense = dense_decode(jnp.asarray(q), jnp.asarray(keys), jnp.asarray(values), plan[2], window=window)
        return np.stack([sparse, dense])

    before, rows = read(keys, values), np.arange(B)
    now_key, now_value = keys.copy(), values.copy()
    now_key[rows, :, LENGTHS - 1] += 1
    now_value[rows, :, LENGTHS - 1] += 1
    assert (np.abs(read(keys, now_value) - before).max(axis=-1) > 0).all()  # in every row and head
    is_only = (LENGTHS == 1) if window is None else np.ones(B, bool)  # a key with no other beside it changes nothing
    assert (np.abs(read(now_key, values) - before).max(axis=-1) > 0)[:, ~is_only].all()
    later = values.copy()
    later[rows[:-1], :, LENGTHS[:-1]] += 1
    np.testing.assert_array_equal(read(keys, later), before)


def test_bfloat16_is_at_most_twice_as_wrong_as_the_plainest_bfloat16_code():
    rng = np.random.default_rng(7)
    q, keys, values, lists, source = sparse_case(rng, 4, 2, 2, LENGTHS, STARTS, num_sinks=3, C=10)
    low_q, low_k, low_v = (jnp.asarray(array, jnp.bfloat16) for array in (q, keys, values))
    q, keys, values = (np.asarray(array, np.float64) for array in (low_q, low_k, low_v))
    plan = [jnp.asarray(array) for array in (lists, source)]
    lengths, starts = jnp.asarray(LENGTHS), jnp.asarray(STARTS)
    sparse = sparse_decode(low_q, low_k, low_v, plan[0], plan[1], lengths, starts, num_sinks=3, max_recent=7)
    expected, reads = expected_sparse(q, keys, values, lists, source, LENGTHS, STARTS, 3, None)
    rows = range(len(LENGTHS))
    all_reads = [[oracle.dense_reads(length)] * 4 for length in LENGTHS]
    all_expected = np.stack([oracle.attention(q[b], keys[b], values[b], all_reads[b]) for b in rows])
    for out, right, slots in (
        (sparse, expected, reads),
        (dense_decode(low_q, low_k, low_v, lengths), all_expected, all_reads),
        (prefill_attention(low_q[:, None], low_k, low_v, lengths - 1)[0][:, 0], all_expected, all_reads),
    ):
        assert out.dtype == jnp.bfloat16
        naive = np.stack([naive_low_precision(low_q[b], low_k[b], low_v[b], slots[b]) for b in rows])
        error = np.abs(np.asarray(out, np.float64) - right).max()
        assert error <= 2 * np.abs(naive - right).max() + 1e-5
