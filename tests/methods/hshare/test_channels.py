"""Label channels have the largest mean |q x k| over all pairs of a prompt query and a cached key."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from hshare_jax.methods.hshare.channels import channel_statistic, choose_channels

F32 = 1e-5  # relative, on sums of products
B, T, K, S, H, R = 3, 5, 2, 24, 8, 3


def random(rng, *shape):
    # The channels have different sizes, as in a real model, so that rounding does not decide which are largest.
    return (rng.standard_normal(shape) * rng.uniform(0.2, 3, shape[-1])).astype(np.float32)


@pytest.mark.parametrize("N", [2, 4, 6])
def test_channels_have_the_largest_mean_product_over_all_pairs(N):
    rng = np.random.default_rng(N)
    queries, keys, lengths = random(rng, B, T, N, H), random(rng, B, K, S, H), np.array([1, 7, S])
    for b in range(B):
        keys[b, :, lengths[b] :] = 1e30  # slots beyond a row's length must not count
    size = jnp.asarray(np.abs(queries).sum(axis=1))
    chosen = choose_channels(size, jnp.asarray(keys), jnp.asarray(lengths), R)
    for b in range(B):
        expected = oracle.choose_channels(queries[b].astype(np.float64), keys[b, :, : lengths[b]], R)
        np.testing.assert_array_equal(chosen[b], expected)


def test_the_statistic_of_a_prompt_is_the_sum_over_its_pairs():
    # A calibration adds up the statistics of many prompts. Each statistic is sum |q| times sum |k|, for every kv head.
    rng = np.random.default_rng(7)
    queries, keys, lengths = random(rng, B, T, 4, H), random(rng, B, K, S, H), np.array([1, 7, S])
    found = channel_statistic(jnp.asarray(np.abs(queries).sum(axis=1)), jnp.asarray(keys), jnp.asarray(lengths))
    for b, k in np.ndindex(B, K):
        pairs = [
            np.abs(q * key) for q in queries[b, :, 2 * k : 2 * k + 2].reshape(-1, H) for key in keys[b, k, : lengths[b]]
        ]
        np.testing.assert_allclose(found[b, k], np.sum(pairs, axis=0), rtol=F32)


def test_equal_channels_go_to_the_lower_one():
    assert choose_channels(jnp.ones((1, 1, H)), jnp.ones((1, 1, 4, H)), jnp.asarray([4]), R).tolist() == [[[0, 1, 2]]]
