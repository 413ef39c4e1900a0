"""Prefill is exact for all chunks, paddings and numbers of calls, and finds the plan of the definition."""

import dataclasses
import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import (
    CAPACITY,
    LENGTHS,
    MODEL,
    PUBLISHED,
    TAILED,
    oracle_row,
    oracle_rows,
    params,
    prefill_rows,
    random_rows,
    vary,
)

from hshare_jax.attend import prefill_attend
from hshare_jax.compile_clock import compile_clock
from hshare_jax.decode_state import init_state
from hshare_jax.decode_step import decode_step
from hshare_jax.kernels.labels import make_labels
from hshare_jax.kv_cache import init_cache
from hshare_jax.methods import H2O
from hshare_jax.methods.hshare.share_plan import SharePlan
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.models.decoder import Decoder
from hshare_jax.prefill import CHUNKS, prefill

F32 = 1e-4  # absolute, on float32 logits of about 5 after four layers
SAME = 1e-5  # between two float32 programs of the same model
LONGEST = 577


@functools.cache
def long_row() -> np.ndarray:
    return random_rows(1, [LONGEST])[0]


@functools.cache
def full_forward() -> np.ndarray:
    """The logits [T, V] of the long row, computed in one piece."""
    positions = jnp.arange(LONGEST, dtype=jnp.int32)[None, :]
    attend = prefill_attend(MODEL, positions, jnp.zeros((1,), jnp.int32))

    @jax.jit
    def forward(params: dict, tokens: jax.Array) -> jax.Array:
        decoder, variables = Decoder(MODEL), {"params": params}
        empty = (init_cache(MODEL, 1, LONGEST, jnp.dtype(jnp.float32)), None)
        hidden, _ = decoder.apply(variables, tokens, positions, attend, empty)  # pyright: ignore[reportAssignmentType]
        return decoder.apply(variables, hidden[0], method="unembed")  # pyright: ignore[reportReturnType]

    return np.asarray(forward(params(), jnp.asarray(long_row()[None])))


def test_the_full_forward_equals_the_oracle():
    row = oracle_row()
    expected = np.stack([row.dense_step(token) for token in long_row()[:70]])
    np.testing.assert_allclose(full_forward()[:70], expected, atol=F32, rtol=0)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 511, 512, 513, 577])
def test_prefill_equals_the_full_forward_around_every_chunk_boundary(length):
    assert CHUNKS == (64, 512)
    logits, state = prefill_rows([long_row()[:length]], method=None, capacity=640)
    np.testing.assert_allclose(logits[0], full_forward()[length - 1], atol=SAME, rtol=0)
    assert state.cache.lengths.tolist() == [length]
    for array in (*state.cache.keys, *state.cache.values):
        assert (np.asarray(array)[:, :, length:] == 0).all()  # padding is not written
        assert (np.abs(np.asarray(array)[:, :, :length]).max(axis=-1) > 0).all()


def test_a_padded_row_equals_the_row_alone():
    rows = [long_row()[:length] for length in (1, 64, 65, 130, 577)]
    logits, _ = prefill_rows(rows, method=None, capacity=640)
    for b, row in enumerate(rows):
        np.testing.assert_allclose(logits[b], full_forward()[len(row) - 1], atol=SAME, rtol=0)


def test_ids_in_the_padding_change_nothing():
    rows, lengths = random_rows(2), jnp.asarray(LENGTHS, jnp.int32)
    found = []
    for pad in (0, 17):
        tokens = np.full((4, 60), pad, np.int32)
        for b, row in enumerate(rows):
            tokens[b, : len(row)] = row
        state = init_state(MODEL, 4, CAPACITY, method=TAILED)
        found.append(prefill(params(), jnp.asarray(tokens), lengths, state, config=MODEL, method=TAILED))
    for one, other in zip(jax.tree.leaves(found[0]), jax.tree.leaves(found[1]), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("first", [1, 40, 64, 99])
def test_a_prompt_in_two_calls_equals_one_call(first):
    row = long_row()[:100]
    _, state = prefill_rows([row[:first]], method=None, capacity=640)
    logits, state = prefill_rows([row[first:]], method=None, state=state)
    once, expected = prefill_rows([row], method=None, capacity=640)
    np.testing.assert_allclose(logits, once, atol=SAME, rtol=0)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=SAME, rtol=0)


@pytest.mark.parametrize("method", [TAILED, PUBLISHED], ids=["units", "published"])
def test_channels_and_plan_equal_the_definition_on_both_turns(method):
    rows, more = random_rows(3), random_rows(4, (20, 1, 40, 3))
    state, J = None, method.settings.num_lists(MODEL)
    identity = np.arange(MODEL.num_layers * J).reshape(MODEL.num_layers, J)
    shared_rows = oracle_rows(rows, method)
    for turn in (rows, more):
        logits, state = prefill_rows(turn, method=method, state=state)
        assert isinstance(state.method_state, SharedLists)
        for b, shared_row in enumerate(shared_rows):
            if turn is more:
                expected = shared_row.prefill(turn[b])
                np.testing.assert_allclose(logits[b], expected, atol=F32, rtol=0)
            # Channels count all queries of the turn, even if the prompt is too short for a probe.
            np.testing.assert_array_equal(state.method_state.channels[b], shared_row.channels)
            source = [[divmod(flat, J) for flat in layer] for layer in state.method_state.source[b].tolist()]
            assert source == shared_row.source
        is_identity = (np.asarray(state.method_state.source) == identity).all(axis=(1, 2))
        assert is_identity.tolist() == ([True, True, True, False] if turn is rows else [False, True, False, False])
        assert state.method_state.age.tolist() == [0] * 4


def test_channels_of_a_prompt_in_chunks_count_all_queries():
    # The sum of |q| runs over both chunks. The padding of a row does not count, whatever it holds.
    rows = [long_row()[:length] for length in (577, 513, 512, 400)]
    state = prefill_rows(rows, method=TAILED, capacity=640)[1]
    assert isinstance(state.method_state, SharedLists)
    exact = oracle_row()
    for token in rows[0]:  # the other rows begin with the same tokens
        exact.dense_step(token)
    for b, row in enumerate(rows):
        for layer in range(MODEL.num_layers):
            keys = np.abs(exact.cached_keys(layer)[:, : len(row)]).mean(axis=1)
            queries = (
                np.abs(np.stack(exact.queries[layer][: len(row)]))
                .mean(axis=0)
                .reshape(MODEL.num_kv_heads, 2, -1)
                .sum(axis=1)
            )
            best = np.argsort(-keys * queries, axis=-1, kind="stable")[:, :3]
            np.testing.assert_array_equal(state.method_state.channels[b, layer], np.sort(best, axis=-1))


def test_tails_of_a_prompt_in_chunks_are_fitted_on_the_probes_of_all_chunks():
    (row,), capacity = random_rows(5, [LONGEST], more=2), 640
    logits, state = prefill_rows([row[:LONGEST]], method=TAILED, capacity=capacity)
    shared_row = oracle_rows([row[:LONGEST]], TAILED)[0]
    for token in row[LONGEST:]:
        logits, state = decode_step(params(), jnp.asarray([token]), state, config=MODEL)
        np.testing.assert_allclose(logits[0], shared_row.decode(token), atol=F32, rtol=0)


@pytest.mark.parametrize("bits", [4, 8, None])
def test_labels_are_the_cached_keys_on_the_channels(bits):
    method = vary(TAILED, label_bits=bits)
    _, state = prefill_rows(random_rows(3), method=method)
    assert isinstance(state.method_state, SharedLists)
    assert state.method_state.labels[0] is None  # layer 0 is dense
    for layer in range(1, MODEL.num_layers):
        expected = make_labels(state.cache.keys[layer], state.method_state.channels[:, layer], bits)
        for one, other in zip(
            jax.tree.leaves(state.method_state.labels[layer]), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_array_equal(one, other)


def test_progress_counts_every_token_once():
    seen = []
    tokens, lengths = jnp.zeros((1, 577), jnp.int32), jnp.asarray([577])
    prefill(params(), tokens, lengths, init_state(MODEL, 1, 640), config=MODEL, progress=seen.append)
    assert seen == [512, 65]


def test_prefill_inside_a_jit_equals_prefill():
    rows = random_rows(2)
    tokens = np.zeros((4, 60), np.int32)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row

    @jax.jit
    def start(params, tokens, lengths):
        state = init_state(MODEL, 4, CAPACITY, method=TAILED)
        return prefill(params, tokens, lengths, state, config=MODEL, method=TAILED)

    logits, state = start(params(), jnp.asarray(tokens), jnp.asarray(LENGTHS, jnp.int32))
    expected, expected_state = prefill_rows(rows, method=TAILED)
    np.testing.assert_allclose(logits, expected, atol=SAME, rtol=0)
    assert isinstance(state.method_state, SharedLists)
    assert isinstance(expected_state.method_state, SharedLists)
    np.testing.assert_array_equal(state.method_state.source, expected_state.method_state.source)


@pytest.mark.parametrize(
    ("shape", "lengths", "message"),
    [
        ((2, 4), (1, 1), r"tokens is int32\[2, 4\]; for this state it must be \[1, 4\] of dtype integer"),
        ((1, 4), (0,), r"lengths\[0\]=0 must lie between 1 and the 4 tokens given"),
        ((1, 4), (5,), r"lengths\[0\]=5 must lie between 1 and the 4 tokens given"),
        ((1, 300), (257,), "row 0 would hold 257 tokens, but capacity=256; make the state larger"),
    ],
)
def test_prompts_that_do_not_fit_are_refused_before_computing(shape, lengths, message):
    with pytest.raises(ValueError, match=message):
        prefill(
            params(), jnp.zeros(shape, jnp.int32), jnp.asarray(lengths, jnp.int32), init_state(MODEL, 1, 200),
            config=MODEL,
        )  # fmt: skip


def test_a_row_beyond_the_models_positions_is_refused():
    state = init_state(MODEL, 1, MODEL.max_positions)
    tokens, lengths = jnp.zeros((1, 1025), jnp.int32), jnp.asarray([1025])
    with pytest.raises(ValueError, match=r"row 0 would hold 1025 tokens, beyond the model's 1024 positions \(max_pos"):
        prefill(params(), tokens, lengths, state, config=MODEL)


@pytest.mark.usefixtures("unchecked")
def test_tokens_that_are_no_array_are_named():
    with pytest.raises(ValueError, match="tokens is list; for this state it must be"):
        prefill(params(), [[1, 2]], jnp.asarray([2]), init_state(MODEL, 1, 200), config=MODEL)  # pyright: ignore[reportArgumentType]


def test_prompts_of_another_length_compile_nothing():
    def run(num_tokens):
        tokens, lengths = jnp.zeros((1, num_tokens), jnp.int32), jnp.asarray([num_tokens])
        state = init_state(MODEL, 1, 1024, method=TAILED)
        with compile_clock() as clock:
            prefill(params(), tokens, lengths, state, config=MODEL, method=TAILED)
        return clock.seconds

    run(600)
    assert run(577) == run(70) == 0


def test_a_row_that_outgrows_its_capacity_under_jit_yields_nan():
    state = init_state(MODEL, 2, 256)
    tokens, weights = jnp.ones((2, 300), jnp.int32), params()
    run = jax.jit(lambda lengths, state: prefill(weights, tokens, lengths, state, config=MODEL)[0])
    logits = np.asarray(run(jnp.array([300, 20]), state))
    assert np.isnan(logits[0]).all()
    assert np.isfinite(logits[1]).all()


@pytest.mark.parametrize(("started", "given"), [(TAILED, None), (None, TAILED)], ids=["without", "with"])
def test_a_state_of_another_method_is_refused(started, given):
    state, tokens = init_state(MODEL, 1, CAPACITY, method=started), jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(
        ValueError, match=r"does not fit the state, which init_state made for .*: give both the same method"
    ):
        prefill(params(), tokens, jnp.asarray([4]), state, config=MODEL, method=given)


@pytest.mark.parametrize(
    "given",
    [
        vary(TAILED, num_critical=7),
        dataclasses.replace(TAILED, plan=SharePlan(((0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11)))),
        dataclasses.replace(TAILED, channels=np.tile(np.arange(8), (4, 3, 1))),
        H2O(num_heavy=4, num_recent=4),
    ],
    ids=["settings", "plan", "channels", "another method"],
)
def test_a_method_that_differs_in_what_it_reads_is_refused(given):
    state, tokens = init_state(MODEL, 1, CAPACITY, method=TAILED), jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="differs from the method that init_state was given"):
        prefill(params(), tokens, jnp.asarray([4]), state, config=MODEL, method=given)


def test_the_search_of_a_plan_may_change_between_turns():
    state, tokens = init_state(MODEL, 1, CAPACITY, method=TAILED), jnp.zeros((1, 40), jnp.int32)
    other = vary(TAILED, layer_ratio=Fraction(1))
    logits, _ = prefill(params(), tokens, jnp.asarray([40]), state, config=MODEL, method=other)
    assert np.isfinite(logits).all()
