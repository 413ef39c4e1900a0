"""Prefill attention, and the attention that slots receive, equal a float64 oracle in every implementation.

Pallas' kernels run in its interpreter here. tests/kernels/test_pallas.py lowers them for CUDA. scripts/check_triton.sh
runs the Triton kernels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from hshare_jax.kernels.api import prefill_attention, prefill_attention_received
from hshare_jax.kernels.implementations import IMPLEMENTATIONS, traced_platform
from hshare_jax.kernels.tiling import Tiles

F32 = 1e-5  # absolute, on outputs of about 1
JUNK = 1e30  # fills slots that are not read; finite, and so are its products
B, N, K, S, H = 6, 4, 2, 512, 8
# The implementations that run on this machine and prefill by themselves.
ROWS = {
    name: row for name, row in IMPLEMENTATIONS.items()
    if row.prefills and (not row.platforms or traced_platform() in row.platforms) and row.obstacle() is None
}  # fmt: skip
WAYS = {name: functools.partial(row.prefill.prefill_attention, **row.options) for name, row in ROWS.items()}
# And the kernels in blocks that do not divide the queries and the windows.
KERNELS = [name for name in ROWS if name != "reference"]
SMALL = Tiles(32, 4, 1, queries=16)
TILED = [name for name in KERNELS if name != "native"]
WAYS |= {f"{name}, small blocks": functools.partial(WAYS[name], tiles=SMALL) for name in TILED}


def cache(rng, lengths):
    """Keys and values [B, K, S, H], with junk in the slots at and beyond each row's length."""
    keys, values = (rng.standard_normal((len(lengths), K, S, H)).astype(np.float32) for _ in range(2))
    for b, length in enumerate(lengths):
        keys[b, :, length:], values[b, :, length:] = JUNK, JUNK
    return keys, values


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("window", [None, 1, 40, 300])
@pytest.mark.parametrize("T", [1, 3, 64])
def test_prefill_attention_equals_the_definition(T, window, way):
    rng = np.random.default_rng(6)
    starts = np.array([0, 1, 255 - T, 256 - T, 257 - T, S - T]).clip(0)
    q = rng.standard_normal((B, T, N, H)).astype(np.float32)
    keys, values = cache(rng, starts + T)
    attend = jax.jit(functools.partial(WAYS[way], window=window))
    out, log_total = attend(*map(jnp.asarray, (q, keys, values, starts)))
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
        prefill_attention(q, kv, kv, jnp.zeros((1,), jnp.int32), impl="reference")


@pytest.mark.parametrize("impl", ROWS)
@pytest.mark.parametrize("window", [None, 40])
def test_received_attention_is_the_sum_of_the_weights_of_the_counted_queries(window, impl):
    rng, T = np.random.default_rng(7), 3
    starts = np.array([0, 1, 254, 255, 256, S - T])
    q, (keys, values) = rng.standard_normal((B, T, N, H)).astype(np.float32), cache(rng, starts + T)
    is_counted = rng.random((B, T)) < 0.7
    attend = functools.partial(prefill_attention_received, *map(jnp.asarray, (q, keys, values, starts)))
    out, received = attend(is_counted=jnp.asarray(is_counted), window=window, impl=impl)
    expected = prefill_attention(*map(jnp.asarray, (q, keys, values, starts)), window=window, impl=impl)
    np.testing.assert_array_equal(out, expected)
    expected = np.zeros((B, N, S))
    for b, t in np.argwhere(is_counted):
        scores = oracle.key_scores(q[b, t].astype(np.float64), keys[b].astype(np.float64))
        expected[b] += oracle.softmaxed(scores, oracle.dense_reads(starts[b] + t + 1, window))
    np.testing.assert_allclose(received, expected, atol=F32, rtol=0)


@pytest.mark.parametrize("impl", KERNELS)
def test_queries_before_the_first_token_and_beyond_the_cache_are_no_harm_to_others(impl):
    # The layers of kv-sharing models that look up begin at position -1.
    rng, T, starts = np.random.default_rng(8), 20, np.array([-1, S - 10])
    q, (keys, values) = rng.standard_normal((2, T, N, H)).astype(np.float32), cache(rng, [T - 1, S])
    attend = functools.partial(prefill_attention_received, *map(jnp.asarray, (q, keys, values, starts)))
    is_counted = jnp.asarray((starts[:, None] + np.arange(T) >= 0) & (starts[:, None] + np.arange(T) < S))
    found, expected = (attend(is_counted=is_counted, impl=impl) for impl in (impl, "reference"))
    for ours, theirs in zip(found, expected, strict=True):
        assert np.isfinite(ours).all()
        counted = np.asarray(is_counted) if ours.shape[1] == T else np.ones(ours.shape[:2], bool)
        np.testing.assert_allclose(ours[counted], theirs[counted], atol=F32, rtol=0)
