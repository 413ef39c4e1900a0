"""What is added where there is nothing to stand for, what extreme numbers give, and how much a tail weighs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hshare_jax.kernels.masked_softmax import MASKED
from hshare_jax.kernels.tail import HIGH, LOW, Tail, add_tail, no_tail

B, N, H = 2, 3, 8


def case(rank):
    """The arguments of `add_tail` for a row that reads 10 of 40 slots, with bounds that hold some tails back."""
    rng = np.random.default_rng(1)
    out, q = rng.standard_normal((2, B, N, H)).astype(np.float32)
    total, mean = rng.standard_normal((2, B, N)).astype(np.float32)
    keys, values = rng.standard_normal((2, B, N, 1 + rank, H)).astype(np.float32)
    terms = rng.standard_normal((B, N, 6 + rank)).astype(np.float32)
    terms[..., LOW], terms[..., HIGH] = -1, 1
    arrays = (out, total, mean, np.full((B, N), 30, np.int32), q, keys, values, terms)
    *read, keys, values, terms = map(jnp.asarray, arrays)
    return read, Tail(keys, values, terms)


@pytest.mark.parametrize("rank", [0, 2])
def test_heads_that_read_all_and_heads_without_a_tail_stay_as_they_are(rank):
    (out, total, mean, num_unread, q), tail = case(rank)
    changed = np.asarray(add_tail(out, total, mean, num_unread, q, tail) != out)
    assert changed.any(axis=-1).all()
    np.testing.assert_array_equal(add_tail(out, total, mean, jnp.zeros_like(num_unread), q, tail), out)
    without = Tail(tail.keys, tail.values, tail.terms.at[..., LOW : HIGH + 1].set(MASKED))
    for nothing in (without, no_tail(B, N, H, rank, jnp.dtype(jnp.float32))):
        np.testing.assert_array_equal(add_tail(out, total, mean, num_unread, q, nothing), out)


@pytest.mark.parametrize("size", [1, 1e30])  # of the tail's keys
@pytest.mark.parametrize("total", [MASKED, 0.0, 1e4])
def test_extreme_inputs_give_finite_numbers(total, size):
    (out, _, mean, num_unread, q), tail = case(2)
    tail = Tail(tail.keys * size, tail.values, tail.terms)
    assert np.isfinite(add_tail(out, jnp.full((B, N), total), mean, num_unread, q, tail)).all()


def test_a_tail_is_all_of_the_attention_where_nothing_is_read():
    (out, _, mean, num_unread, q), tail = case(0)
    found = add_tail(jnp.zeros_like(out), jnp.full((B, N), MASKED), mean, num_unread, q, tail)
    np.testing.assert_array_equal(found, tail.values[:, :, 0])


@pytest.mark.parametrize(
    ("rank", "dtype", "num_tokens"),
    [
        (0, jnp.float32, 1 + 6 / 16),  # 6 terms beside keys and values of 8 numbers each
        (2, jnp.float32, 3 + 8 / 16),
        (2, jnp.bfloat16, 3 + 8 / 8),  # terms stay in float32, which weighs twice as much
    ],
)
def test_the_weight_of_a_tail_in_tokens_counts_all_that_it_holds(rank, dtype, num_tokens):
    tail = no_tail(B, N, H, rank, jnp.dtype(dtype))
    row_bytes = H * jnp.dtype(dtype).itemsize
    assert tail.num_tokens(row_bytes) == num_tokens
    num_bytes = sum(array.nbytes for array in jax.tree.leaves(tail))
    assert num_bytes == B * N * num_tokens * 2 * row_bytes
    assert tail.num_tokens(row_bytes // 2) == 2 * num_tokens  # beside a cache of half as many bytes
