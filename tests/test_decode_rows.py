"""The rows of a batch decode as each would alone, whatever their lengths and ages and whatever they read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import SAME, decode, on_schedule, shared_of, start, tokens_at
from tiny_decoder import CAPACITY, LENGTHS, MODEL, PUBLISHED, SHARED_KV, TAILED, params, random_rows, vary

from hshare_jax.decode_step import decode_step
from hshare_jax.kernels.tail import LOW

WIDE = vary(TAILED, num_critical=120)  # more than any row here holds
GATED = vary(TAILED, min_length=30)


@pytest.mark.parametrize("lengths", [(1, 5, 11, 12), LENGTHS], ids=["all", "some"])
def test_rows_below_the_gate_decode_as_dense_to_the_bit(lengths):
    steps, rows = 6, random_rows(21, lengths, more=6)
    gated, state = decode(rows, start(rows, lengths, method=GATED), steps, lengths=lengths)
    dense, expected = decode(rows, start(rows, lengths, method=None), steps, lengths=lengths)
    below = np.array(lengths) + steps < GATED.settings.min_length
    np.testing.assert_array_equal(gated[:, below], dense[:, below])
    for one, other in zip(jax.tree.leaves(state.cache), jax.tree.leaves(expected.cache), strict=True):
        np.testing.assert_array_equal(np.asarray(one)[below], np.asarray(other)[below])
    if not below.all():
        sparse, _ = decode(rows, start(rows, lengths, method=TAILED), steps, lengths=lengths)
        np.testing.assert_allclose(gated[:, ~below], sparse[:, ~below], atol=SAME, rtol=0)
        assert np.abs(sparse[:, ~below] - dense[:, ~below]).max() > 100 * SAME  # rows above the gate are not dense


@pytest.mark.parametrize(
    ("method", "kv_cache_dtype"),
    [(None, "auto"), (TAILED, "auto"), (vary(PUBLISHED, num_probes=4), "auto"), (TAILED, "int8")],
    ids=["dense", "units", "published", "units, 8 bits"],
)
def test_a_row_in_a_ragged_batch_equals_the_row_alone(method, kv_cache_dtype):
    rows = random_rows(24, more=7)
    started = start(rows, method=method, kv_cache_dtype=kv_cache_dtype)
    source = None if method is None else np.asarray(shared_of(started).source)
    logits, state = decode(rows, started, 7)
    for b, length in enumerate(LENGTHS):
        alone = start([rows[b]], [length], method=method, kv_cache_dtype=kv_cache_dtype)
        if source is not None:
            np.testing.assert_array_equal(shared_of(alone).source[0], source[b])
        own, alone = decode([rows[b]], alone, 7, lengths=[length])
        np.testing.assert_allclose(logits[:, b], own[:, 0], atol=SAME, rtol=0)
        if method is not None:
            np.testing.assert_array_equal(shared_of(alone).token_indices[:, 0], shared_of(state).token_indices[:, b])


@pytest.mark.parametrize(
    ("config", "method"),
    [(MODEL, WIDE), (MODEL, vary(WIDE, lists_per="query_head")), (SHARED_KV, WIDE)],
    ids=["J=K", "J=N", "shared KV"],
)
def test_a_budget_that_covers_the_row_equals_dense(config, method):
    # Lists hold all tokens up to the last refresh, and the recent range holds the tokens since then.
    rows = random_rows(5, more=8)
    dense, _ = decode(rows, start(rows, method=None, config=config), 8, config=config)
    shared, _ = decode(rows, start(rows, method=method, config=config), 8, config=config)
    np.testing.assert_allclose(shared, dense, atol=SAME, rtol=0)


def test_a_tail_changes_nothing_where_everything_is_read():
    # A budget as wide as the row leaves no probe to fit a tail on, so the tails are those of a narrow budget.
    rows = random_rows(28, more=4)
    tails = shared_of(start(rows, method=TAILED)).tails
    assert all(tail is not None and (tail.terms[3, :, LOW] > -100).all() for tail in tails[1:])
    without, _ = decode(rows, start(rows, method=WIDE), 4)
    state = start(rows, method=WIDE)
    state = dataclasses.replace(state, method_state=dataclasses.replace(shared_of(state), tails=tails))
    found, _ = decode(rows, state, 4)
    np.testing.assert_array_equal(found, without)


def test_rows_that_refresh_by_age_equal_the_static_schedule():
    rows = random_rows(6, more=7)
    by_age, of_ages = decode(rows, start(rows, method=TAILED), 7)
    static, of_static = decode(rows, start(rows, method=TAILED), 7, refresh=on_schedule)
    np.testing.assert_array_equal(by_age, static)
    for one, other in zip(jax.tree.leaves(of_ages), jax.tree.leaves(of_static), strict=True):
        np.testing.assert_array_equal(one, other)


def test_rows_of_different_age_refresh_at_different_steps():
    rows = random_rows(7, more=8)
    state = start(rows, method=TAILED)
    ages = jnp.asarray([0, 1, 2, 3], jnp.int32)
    state = dataclasses.replace(state, method_state=dataclasses.replace(shared_of(state), age=ages))
    starts = []
    for step in range(6):
        _, state = decode_step(params(), tokens_at(rows, LENGTHS, step), state, config=MODEL)
        starts.append(np.asarray(state.cache.lengths) - np.asarray(shared_of(state).recent_start))
    # The long row has age 3, so it refreshes at once. Its recent range is 4, 5, 6 tokens long and then starts again.
    assert [of_step[3] for of_step in starts] == [4, 5, 6, 4, 5, 6]
    # Row 2 has age 2, so it refreshes on the second step. Until then its recent range is as long as it may be.
    assert [of_step[2] for of_step in starts] == [6, 4, 5, 6, 4, 5]


def test_rows_that_have_ended_append_nothing_and_keep_their_state():
    rows = random_rows(8, more=5)
    is_active = jnp.asarray([True, False, True, False])
    _, state = decode(rows, start(rows, method=TAILED), 1)
    kept = [np.asarray(leaf).copy() for leaf in jax.tree.leaves(state)]
    found = []
    for step in range(1, 4):
        tokens = tokens_at(rows, LENGTHS, step)
        logits, state = decode_step(params(), tokens, state, config=MODEL, is_active=is_active)
        found.append(np.asarray(logits))
    expected, everyone = decode(rows, start(rows, method=TAILED), 4)
    np.testing.assert_allclose(np.stack(found)[:, ::2], expected[1:, ::2], atol=SAME, rtol=0)
    for leaf, was, other in zip(jax.tree.leaves(state), kept, jax.tree.leaves(everyone), strict=True):
        axis = 1 if leaf is shared_of(state).token_indices else 0
        now, was, other = (np.moveaxis(np.asarray(array), axis, 0) for array in (leaf, was, other))
        np.testing.assert_array_equal(now[1::2], was[1::2])
        np.testing.assert_allclose(now[::2], other[::2], atol=SAME, rtol=0)
    assert state.cache.lengths.tolist() == [5, 6, 15, 61]


@pytest.mark.parametrize("method", [None, TAILED], ids=["dense", "shared"])
def test_a_full_row_yields_nan_and_leaves_the_others_alone(method):
    lengths = (CAPACITY, *LENGTHS[1:])
    rows = random_rows(9, lengths, more=5)
    logits, state = decode(rows, start(rows, lengths, method=method), 5, lengths=lengths)
    assert np.isnan(logits[:, 0]).all()
    expected, _ = decode(rows, start(rows, lengths, method=method, capacity=CAPACITY + 8), 5, lengths=lengths)
    np.testing.assert_allclose(logits[:, 1:], expected[:, 1:], atol=SAME, rtol=0)
    assert np.isfinite(np.asarray(state.cache.keys[0])).all()
