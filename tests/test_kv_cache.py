"""The KV cache: the shapes of an empty one. Appending is tested in tests/kernels/test_implementations.py."""

import jax.numpy as jnp
import pytest
from tiny_decoder import MODEL

from hshare_jax.kv_cache import init_cache


@pytest.mark.parametrize(("capacity", "slots"), [(1, 256), (256, 256), (257, 512)])
def test_capacity_rounds_up_to_whole_blocks(capacity, slots):
    cache = init_cache(MODEL, 2, capacity, jnp.dtype(jnp.float32))
    assert cache.capacity == slots
    assert cache.lengths.tolist() == [0, 0]
    assert {array.shape for array in (*cache.keys, *cache.values)} == {(2, 3, slots, 8)}
