"""Keys and values in 8 bits: what they stand for, and what is refused. The kernels on them: test_implementations.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import MODEL

import hshare_jax
from hshare_jax import SettingError, init_state
from hshare_jax.kernels.int8_rows import Int8Rows, as_cached, quantise_rows, row_bytes, row_floats


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_row_is_off_by_at_most_half_a_step_of_its_largest_number(dtype):
    rows = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 5, 16)) * 3, dtype)
    found, exact = quantise_rows(rows), np.asarray(rows, np.float64)
    step = np.abs(exact).max(axis=-1, keepdims=True) / 127
    assert found.shape == rows.shape
    assert found.to_floats().dtype == dtype
    codes = np.asarray(found.qvalue, np.float64) * np.asarray(found.scale, np.float64)[..., None]
    assert (np.abs(codes - exact) <= step * 0.5001).all()
    assert (np.abs(np.asarray(found.qvalue)).max(axis=-1) == 127).all()


def test_rows_of_nothing_stay_so_and_rows_that_are_not_finite_become_nan():
    rows = jnp.asarray([[0.0, 0.0], [1e-39, 0.0], [1.0, np.nan], [np.inf, 1.0], [1.0, -2.0]])
    floats = np.asarray(quantise_rows(rows).to_floats())
    np.testing.assert_array_equal(floats[:2], 0)
    assert np.isnan(floats[2:4]).any(axis=1).all()
    np.testing.assert_allclose(floats[4], rows[4], rtol=1e-2)


def test_a_cache_says_how_new_rows_are_kept_and_what_a_row_takes():
    new = jnp.ones((2, 1, 3, 8))
    floats = jnp.zeros((2, 3, 16, 8), jnp.bfloat16)
    bits = Int8Rows(jnp.zeros((2, 3, 16, 8), jnp.int8), jnp.zeros((2, 3, 16)), jnp.dtype("bfloat16"))
    assert as_cached(floats, new).dtype == jnp.bfloat16
    kept = as_cached(bits, new)
    assert isinstance(kept, Int8Rows)
    assert kept.scale.shape == (2, 1, 3)
    assert row_floats(kept).dtype == jnp.bfloat16
    assert (row_bytes(floats), row_bytes(bits)) == (16, 12)


@pytest.mark.usefixtures("unchecked")
def test_other_dtypes_of_a_cache_are_refused():
    with pytest.raises(SettingError, match="kv_cache_dtype='int4' must be one of 'auto', 'int8'"):
        init_state(MODEL, 1, 8, kv_cache_dtype="int4")  # pyright: ignore[reportArgumentType]
    with pytest.raises(SettingError, match="kv_cache_dtype='fp8' must be one of 'auto', 'int8'"):
        hshare_jax.load_model("smollm2-135m-instruct", kv_cache_dtype="fp8")  # pyright: ignore[reportArgumentType]


def test_a_state_in_8_bits_takes_a_byte_a_number_and_four_a_row():
    cache = init_state(MODEL, 2, 256, kv_cache_dtype="int8").cache
    size = sum(array.nbytes for array in jax.tree.leaves((cache.keys, cache.values)))
    assert size == 2 * 256 * MODEL.cache_bytes_per_token(1, 4)
