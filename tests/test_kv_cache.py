"""The KV cache: every row appends at its slots, and tokens beyond the capacity are dropped."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import MODEL

from hshare_jax.kv_cache import append, init_cache


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("axis", [2, 3])
def test_each_row_appends_at_its_slots_and_drops_tokens_beyond_the_capacity(T, axis):
    # Slots are the third axis of keys and values, and the last axis of labels.
    rng = np.random.default_rng(T)
    cache, new = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 2, 8, 4), (3, T, 2, 4)))
    slots = np.array([[0, 1, 2], [5, 6, 7], [7, 8, 9]])[:, :T]
    if T == 1:
        slots[1] = 8  # slot 8 is the capacity, so this row has ended
    expected = cache.copy()
    for b, t in np.ndindex(3, T):
        if slots[b, t] < 8:
            expected[b, :, slots[b, t]] = new[b, t]
    found = append(jnp.asarray(np.moveaxis(cache, 2, axis)), jnp.asarray(new), jnp.asarray(slots), axis=axis)
    np.testing.assert_array_equal(found, np.moveaxis(expected, 2, axis))


@pytest.mark.parametrize("T", [1, 3])
def test_bytes_of_labels_are_appended_unchanged(T):
    cache, new = jnp.zeros((1, 2, 3, 8), jnp.uint8), jnp.full((1, T, 2, 3), 0xF1, jnp.uint8)
    found = append(cache, new, jnp.arange(T)[None, :] + 4, axis=3)
    assert found.dtype == jnp.uint8
    assert (found[0, 0, 0].tolist()) == [0] * 4 + [0xF1] * T + [0] * (4 - T)


def test_appended_tokens_take_the_dtype_of_the_cache():
    cache = append(jnp.zeros((1, 2, 8, 4), jnp.bfloat16), jnp.ones((1, 1, 2, 4)), jnp.asarray([[3]]))
    assert cache.dtype == jnp.bfloat16


@pytest.mark.parametrize(("capacity", "slots"), [(1, 256), (256, 256), (257, 512)])
def test_capacity_rounds_up_to_whole_blocks(capacity, slots):
    cache = init_cache(MODEL, 2, capacity, jnp.dtype(jnp.float32))
    assert cache.capacity == slots
    assert cache.lengths.tolist() == [0, 0]
    assert {array.shape for array in (*cache.keys, *cache.values)} == {(2, 3, slots, 8)}
