"""Labels: the channels chosen and the scores taken on them are those of the definition."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from hshare_jax.labels import choose_channels, score_labels, take_channels

F32 = 1e-5  # absolute, on scores of about 1
B, P, K, S, H, R = 3, 5, 2, 24, 8, 3


def random(rng, *shape):
    # Channels of different size, as in a real model: so the largest ones are no accident of rounding.
    return (rng.standard_normal(shape) * rng.uniform(0.2, 3, shape[-1])).astype(np.float32)


@pytest.mark.parametrize("N", [2, 4, 6])
def test_channels_are_those_of_the_largest_mean_product_over_all_pairs(N):
    rng = np.random.default_rng(N)
    probes, keys, lengths = random(rng, B, P, N, H), random(rng, B, K, S, H), np.array([1, 7, S])
    for b in range(B):
        keys[b, :, lengths[b] :] = 1e30  # slots beyond a row's length have no say
    chosen = choose_channels(jnp.asarray(probes), jnp.asarray(keys), jnp.asarray(lengths), R)
    for b in range(B):
        expected = oracle.choose_channels(probes[b].astype(np.float64), keys[b, :, : lengths[b]], R)
        np.testing.assert_array_equal(chosen[b], expected)


def test_without_probes_channels_are_those_of_the_largest_keys():
    # A prompt shorter than the budget has no probe, but what is generated after it may outgrow the budget.
    rng = np.random.default_rng(9)
    keys, lengths = random(rng, 1, K, S, H), np.array([7])
    chosen = choose_channels(jnp.zeros((1, P, 4, H)), jnp.asarray(keys), jnp.asarray(lengths), R)
    np.testing.assert_array_equal(chosen[0], oracle.choose_channels(np.zeros((0, 4, H)), keys[0, :, :7], R))
    assert chosen[0].tolist() != [[0, 1, 2]] * K


def test_equal_channels_go_to_the_lower_one():
    ones = jnp.ones((1, 1, 4, H))
    assert choose_channels(ones.swapaxes(1, 2), ones, jnp.asarray([4]), R).tolist() == [[[0, 1, 2]]]


@pytest.mark.parametrize("N", [2, 6])
def test_scores_are_the_products_on_the_label_channels(N):
    rng = np.random.default_rng(10 + N)
    q, keys = random(rng, B, N, H), random(rng, B, K, S, H)
    channels = np.sort([[rng.permutation(H)[:R] for _ in range(K)] for _ in range(B)], axis=-1)
    labels = take_channels(jnp.asarray(keys), jnp.asarray(channels))
    scores = score_labels(jnp.asarray(q), labels, jnp.asarray(channels))
    for b in range(B):
        np.testing.assert_allclose(scores[b], oracle.label_scores(q[b], keys[b], channels[b]), atol=F32, rtol=1e-6)


def test_with_all_channels_scores_are_those_of_attention():
    rng = np.random.default_rng(20)
    q, keys = random(rng, 1, K, H), random(rng, 1, K, S, H)
    channels = jnp.tile(jnp.arange(H), (1, K, 1))
    scores = score_labels(jnp.asarray(q), take_channels(jnp.asarray(keys), channels), channels)
    np.testing.assert_allclose(scores[0], np.einsum("NH,NSH->NS", q[0], keys[0]) * H**-0.5, atol=F32, rtol=1e-6)


def test_scores_of_bfloat16_labels_are_float32():
    q, labels = jnp.ones((1, 2, H), jnp.bfloat16), jnp.ones((1, 2, S, R), jnp.bfloat16)
    assert score_labels(q, labels, jnp.tile(jnp.arange(R), (1, 2, 1))).dtype == jnp.float32
