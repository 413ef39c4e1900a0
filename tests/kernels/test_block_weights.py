"""Weights in few bits stand for the floats that their definition names."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_oracle import definition, random_nibbles

from hshare_jax.kernels import api
from hshare_jax.kernels.block_weights import floats_of, quantise_blocks, quantise_channels


def test_floats_are_those_of_the_definition_on_the_host_and_on_a_device():
    rng = np.random.default_rng(0)
    for blocks in (random_nibbles(rng, 5, 96), quantise_blocks(rng.standard_normal((5, 96)), np.dtype("float32"))):
        on_device = jax.tree.map(jnp.asarray, blocks)
        for found in (blocks.to_floats(), on_device.to_floats()):
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, definition(blocks), rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(on_device[jnp.asarray([3, 1])].to_floats(), blocks.to_floats()[[3, 1]])


def test_quantising_moves_a_weight_by_at_most_half_a_step_and_keeps_zeros():
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((7, 64)).astype(np.float32)
    weights[2, :32], weights[3, 40] = 0, 0
    blocks = quantise_blocks(weights, np.dtype("bfloat16"))
    assert blocks.dtype == jnp.bfloat16
    floats = dataclasses.replace(blocks, dtype=np.dtype("float32")).to_floats()
    step = np.repeat(blocks.scale.astype(np.float32), 32, axis=1)
    assert (np.abs(floats - weights) <= 0.51 * step + 1e-7).all()  # the scale itself is rounded to float16
    np.testing.assert_array_equal(floats[weights == 0], 0)


def test_a_tree_of_parameters_becomes_floats_and_other_leaves_stay():
    blocks, norm = random_nibbles(np.random.default_rng(2), 3, 32), np.ones(4)
    found = floats_of({"a": {"weight": blocks}, "norm": norm})
    assert found["norm"] is norm
    np.testing.assert_array_equal(found["a"]["weight"], blocks.to_floats())


def test_one_scale_for_each_row_serves_rows_of_any_width():
    weights = np.random.default_rng(4).standard_normal((6, 20)).astype(np.float32)
    blocks = quantise_channels(weights, np.dtype("float32"))
    assert (blocks.shape, blocks.has_channel_scales) == ((6, 20), True)
    assert (np.abs(blocks.to_floats() - weights) <= 0.5001 * np.abs(weights).max(axis=1, keepdims=True) / 127).all()
    x = np.random.default_rng(5).standard_normal((3, 20)).astype(np.float32)
    found = api.project(jax.tree.map(jnp.asarray, blocks), jnp.asarray(x))
    np.testing.assert_allclose(found, x @ blocks.to_floats().T, atol=1e-5)
    large = quantise_channels(np.full((2, 2048), 0.05), np.dtype("float16"))  # whose sums of codes exceed float16
    np.testing.assert_allclose(api.project(large, jnp.ones((1, 2048), jnp.float16)), 102.4, rtol=1e-3)


def test_weights_too_large_for_a_scale_are_refused():
    with pytest.raises(ValueError, match=r"a weight of 9e\+06 is too large for 8 bits with a float16 scale"):
        quantise_blocks(np.full((1, 32), 9e6), np.dtype("float32"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bytes_are_those_of_the_codes_and_scales(dtype):
    blocks = random_nibbles(np.random.default_rng(3), 4, 64, dtype)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(blocks)) == 4 * 64 * 5 // 8
    assert blocks.shape == (4, 64)
