"""Training's attention against its definition, in one block of queries and in several."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import CONFIG

from hshare_jax.training.attention import causal_attend

N, K, H = 4, 2, 8


def attention_by_definition(q, k, v, *, window: int | None, sees_itself: bool) -> np.ndarray:
    """The output [T, N, H] of each query, in float64, from the slots that the query may see."""
    out = np.zeros(q.shape)
    for t, n in np.ndindex(q.shape[:2]):
        slots = [s for s in range(t + sees_itself) if window is None or s > t - window]
        if slots:
            scores = k[slots, n // (N // K)] @ q[t, n] / np.sqrt(H)
            weights = np.exp(scores - scores.max())
            out[t, n] = weights @ v[slots, n // (N // K)] / weights.sum()
    return out


@pytest.mark.parametrize("num_tokens", [1, 2, 63, 64, 65, 129, 300])
@pytest.mark.parametrize("window", [None, 5, 100])
@pytest.mark.parametrize("looks_up", [False, True])
def test_attention_equals_its_definition(num_tokens, window, looks_up):
    config = dataclasses.replace(
        CONFIG, num_layers=3, num_heads=N, num_kv_heads=K, windows=(None, window, None),
        kv_layer_map=(0, 2, 2) if looks_up else None,
    )  # fmt: skip
    rng = np.random.default_rng(num_tokens)
    q, k, v = (rng.normal(size=(1, num_tokens, heads, H)) for heads in (N, K, K))
    queries, keys, values = (jnp.asarray(array, jnp.float32) for array in (q, k, v))
    found, state = causal_attend(config)(1, queries, keys, values, {})
    expected = attention_by_definition(q[0], k[0], v[0], window=window, sees_itself=not looks_up)
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    assert list(state) == [2 if looks_up else 1]


def test_a_layer_without_keys_reads_those_of_the_layer_that_serves_it():
    config = dataclasses.replace(CONFIG, num_layers=2, windows=(None,) * 2, kv_layer_map=(0, 0))
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 7, 2, H)), jnp.float32) for _ in range(3))
    attend = causal_attend(config)
    first, state = attend(0, q, k, v, {})
    second, _ = attend(1, q, None, None, state)
    np.testing.assert_array_equal(first, second)
