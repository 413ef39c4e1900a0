"""Prefill attention, and the attention that slots receive, equal a float64 oracle. So does the fused call."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from hshare_jax.kernels.api import prefill_attention, prefill_attention_received
from hshare_jax.kernels.prefill_attention import fused_prefill, plain_prefill

F32, BF16 = 1e-5, 2e-2  # absolute, on outputs of about 1
JUNK = 1e30  # fills slots that are not read; finite, and so are its products
B, N, K, S, H = 6, 4, 2, 512, 8
prefill = jax.jit(plain_prefill, static_argnames="window")


def cache(rng, lengths):
    """Keys and values [B, K, S, H], with junk in the slots at and beyond each row's length."""
    keys, values = (rng.standard_normal((len(lengths), K, S, H)).astype(np.float32) for _ in range(2))
    for b, length in enumerate(lengths):
        keys[b, :, length:], values[b, :, length:] = JUNK, JUNK
    return keys, values


@pytest.mark.parametrize("window", [None, 1, 40, 300])
@pytest.mark.parametrize("T", [1, 3, 64])
def test_prefill_attention_equals_the_definition(T, window):
    rng = np.random.default_rng(6)
    starts = np.array([0, 1, 255 - T, 256 - T, 257 - T, S - T]).clip(0)
    q = rng.standard_normal((B, T, N, H)).astype(np.float32)
    keys, values = cache(rng, starts + T)
    out, log_total = prefill(*map(jnp.asarray, (q, keys, values, starts)), window=window)
    for b, t in np.ndindex(B, T):
        if t not in (0, 1, T // 2, T - 1):
            continue
        reads = [oracle.dense_reads(starts[b] + t + 1, window)] * N
        np.testing.assert_allclose(out[b, t], oracle.attention(q[b, t], keys[b], values[b], reads), atol=F32, rtol=0)
        for n in range(N):
            scores = keys[b, n * K // N][sorted(reads[n])].astype(np.float64) @ q[b, t, n] / np.sqrt(q.shape[-1])
            np.testing.assert_allclose(log_total[b, n, t], np.log(np.exp(scores).sum()), atol=F32)


def test_prefill_attention_refuses_a_cache_of_broken_blocks():
    q, kv = jnp.zeros((1, 1, 2, 4)), jnp.zeros((1, 2, 300, 4))
    with pytest.raises(ValueError, match="S=300 slots; it must be a multiple of 256"):
        prefill(q, kv, kv, jnp.zeros((1,), jnp.int32))


@pytest.mark.parametrize("window", [None, 40])
def test_received_attention_is_the_sum_of_the_weights_of_the_counted_queries(window):
    rng, T = np.random.default_rng(7), 3
    starts = np.array([0, 1, 254, 255, 256, S - T])
    q, (keys, values) = rng.standard_normal((B, T, N, H)).astype(np.float32), cache(rng, starts + T)
    is_counted = rng.random((B, T)) < 0.7
    out, received = prefill_attention_received(*map(jnp.asarray, (q, keys, values, starts, is_counted)), window=window)
    np.testing.assert_array_equal(out, prefill_attention(*map(jnp.asarray, (q, keys, values, starts)), window=window))
    expected = np.zeros((B, N, S))
    for b, t in np.argwhere(is_counted):
        scores = oracle.key_scores(q[b, t].astype(np.float64), keys[b].astype(np.float64))
        expected[b] += oracle.softmaxed(scores, oracle.dense_reads(starts[b] + t + 1, window))
    np.testing.assert_allclose(received, expected, atol=F32, rtol=0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_call_around_the_fused_prefill_equals_the_plain_one(dtype):
    rng, (B, T, N, K, S, H) = np.random.default_rng(9), (3, 16, 4, 2, 256, 16)
    q, keys, values = (rng.standard_normal(shape) for shape in ((B, T, N, H), (B, K, S, H), (B, K, S, H)))
    starts = jnp.asarray([0, 7, S - T], jnp.int32)
    arrays = [jnp.asarray(array, dtype) for array in (q, keys, values)]
    got = fused_prefill(*arrays, starts=starts, implementation="xla").astype(jnp.float32)
    expected = plain_prefill(*arrays, starts=starts)[0].astype(jnp.float32)
    np.testing.assert_allclose(got, expected, atol=F32 if dtype == jnp.float32 else BF16, rtol=0)
