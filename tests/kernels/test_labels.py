"""Labels: the codes that are kept, and the scores that are taken on them, are those of the definition."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

from hshare_jax.kernels.labels import Labels, label_query, make_labels, quantise, score_keys, score_labels

F32 = 1e-5  # absolute, on scores and labels of about 1
B, K, S, H, R = 3, 2, 24, 8, 3
BITS = [4, 8, None]
make = jax.jit(make_labels, static_argnames="bits")


@functools.partial(jax.jit, static_argnames="bits")
def score(q, labels, channels, bits):
    return score_labels(label_query(q, channels, bits), labels)


code = jax.jit(quantise, static_argnames=("bits", "dtype"))


def random(rng, *shape):
    # The channels have different sizes, as in a real model.
    return (rng.standard_normal(shape) * rng.uniform(0.2, 3, shape[-1])).astype(np.float32)


def random_channels(rng, num_channels=R):
    return np.sort([[rng.permutation(H)[:num_channels] for _ in range(K)] for _ in range(B)], axis=-1)


def read_back(labels: Labels, bits, num_channels):
    """The labels [B, K, S, R] that the codes and scales stand for; and their form is checked."""
    assert (labels.codes.dtype == jnp.uint8) == (bits is not None)
    assert (labels.scales is None) == (bits is None)
    assert labels.codes.shape[2] == (-(-num_channels // 2) if bits == 4 else num_channels)
    return oracle.read_labels(labels.codes, labels.scales, bits, num_channels)


@pytest.mark.parametrize("num_channels", [1, 2, 3, H])
@pytest.mark.parametrize("bits", BITS)
def test_labels_read_back_as_the_definition_quantises(bits, num_channels):
    rng = np.random.default_rng(30)
    keys, channels = random(rng, B, K, S, H), random_channels(rng, num_channels)
    labels = make(jnp.asarray(keys), jnp.asarray(channels), bits)
    found = read_back(labels, bits, num_channels)
    for b, k, s in np.ndindex(B, K, S):
        expected = oracle.quantised(keys[b, k, s, channels[b, k]], bits)
        np.testing.assert_allclose(found[b, k, s], expected, atol=F32, rtol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_bfloat16_keys_keep_their_offsets_and_steps_in_bfloat16(bits):
    rng = np.random.default_rng(31)
    keys = random(rng, B, K, S, H).astype(ml_dtypes.bfloat16)
    channels = random_channels(rng)
    labels = make(jnp.asarray(keys), jnp.asarray(channels), bits)
    assert labels.scales is not None
    assert labels.scales.dtype == jnp.bfloat16
    found = read_back(labels, bits, R)
    for b, k, s in np.ndindex(B, K, S):
        expected = oracle.quantised(keys[b, k, s, channels[b, k]], bits, ml_dtypes.bfloat16)
        np.testing.assert_allclose(found[b, k, s], expected, atol=F32, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_compiled_program_gives_the_codes_and_scales_of_single_operations(bits, dtype):
    rng = np.random.default_rng(34)
    keys, channels = jnp.asarray(random(rng, B, K, 500, H), dtype), jnp.asarray(random_channels(rng))
    compiled, single = make(keys, channels, bits), make_labels(keys, channels, bits)
    for found, expected in zip(jax.tree.leaves(compiled), jax.tree.leaves(single), strict=True):
        np.testing.assert_array_equal(found, expected)


@hypothesis.given(
    codes=hnp.arrays(np.uint8, (1, 2, 3, 5), elements=st.integers(0, 15)), first=st.sampled_from([-8.0, 0.0, 0.25])
)
def test_packed_codes_read_back_whole(codes, first):
    # The least and the greatest code of each token are set, so that the offset is `first` and the step exactly 1.
    codes[..., 0], codes[..., 4] = 0, 15
    keys = jnp.asarray(first + codes, jnp.float32)
    labels = make(keys, jnp.tile(jnp.arange(5), (1, 2, 1)), bits=4)
    np.testing.assert_array_equal(read_back(labels, 4, 5), keys)


@hypothesis.given(x=hnp.arrays(np.float32, (2, 5), elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False)))
@pytest.mark.parametrize("bits", [4, 8])
def test_no_label_is_off_by_more_than_half_a_step(bits, x):
    codes, offset, step = (np.asarray(array, np.float64) for array in code(jnp.asarray(x), bits, jnp.dtype("float32")))
    assert (codes <= 2**bits - 1).all()
    error = np.abs(offset[:, None] + step[:, None] * codes - x).max(axis=-1)
    assert (error <= step / 2 + np.abs(x).max(axis=-1) * F32).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_constant_key_is_its_own_label(bits, dtype):
    keys = jnp.full((B, K, S, H), -1.5, jnp.dtype(dtype)).at[0].set(0)
    channels = jnp.asarray(random_channels(np.random.default_rng(32)))
    found = read_back(make(keys, channels, bits), bits, R)
    np.testing.assert_array_equal(found, np.asarray(keys, np.float64)[..., :R])
    scores = score(jnp.ones((B, K, H), keys.dtype), make(keys, channels, bits), channels, bits)
    np.testing.assert_allclose(scores[1], -1.5 * R / H**0.5, atol=F32, rtol=0)


@pytest.mark.parametrize(("N", "num_channels"), [(2, R), (6, R), (6, 1)])
@pytest.mark.parametrize("bits", BITS)
def test_scores_are_the_products_of_quantised_queries_and_labels(N, num_channels, bits):
    rng = np.random.default_rng(10 + N)
    q, keys, channels = random(rng, B, N, H), random(rng, B, K, S, H), random_channels(rng, num_channels)
    labels = make(jnp.asarray(keys), jnp.asarray(channels), bits)
    scores = score(jnp.asarray(q), labels, jnp.asarray(channels), bits)
    for b in range(B):
        expected = oracle.label_scores(q[b], keys[b].astype(np.float64), channels[b], bits)
        np.testing.assert_allclose(scores[b], expected, atol=F32, rtol=1e-6)


def test_with_all_channels_unquantised_scores_are_those_of_attention():
    rng = np.random.default_rng(20)
    q, keys = (jnp.asarray(random(rng, 1, *shape)) for shape in ((4, H), (K, S, H)))
    channels = jnp.tile(jnp.arange(H), (1, K, 1))
    scores = score(q, make(keys, channels, None), channels, None)
    expected = oracle.key_scores(np.asarray(q[0], np.float64), np.asarray(keys[0], np.float64))
    np.testing.assert_allclose(scores[0], expected, atol=F32, rtol=1e-6)
    np.testing.assert_allclose(score_keys(q, keys)[0], expected, atol=F32, rtol=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_scores_of_bfloat16_keys_are_float32(bits):
    q, keys = jnp.ones((1, 2, H), jnp.bfloat16), jnp.ones((1, 2, S, H), jnp.bfloat16)
    channels = jnp.tile(jnp.arange(R), (1, 2, 1))
    assert score(q, make(keys, channels, bits), channels, bits).dtype == jnp.float32
    assert score_keys(q, keys).dtype == jnp.float32


@pytest.mark.parametrize("bits", BITS)
def test_labels_of_one_token_are_those_of_the_whole_cache(bits):
    # So a decode step appends the labels that a prefill would have made.
    rng = np.random.default_rng(33)
    keys, channels = jnp.asarray(random(rng, B, K, S, H)), jnp.asarray(random_channels(rng))
    whole, one = make(keys, channels, bits), make(keys[:, :, 7:8], channels, bits)
    for of_all, of_one in zip(jax.tree.leaves(whole), jax.tree.leaves(one), strict=True):
        np.testing.assert_array_equal(of_all[..., 7:8], of_one)
