"""The decode step equals the full forward pass and the float64 oracle."""

import dataclasses
from fractions import Fraction

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import SAME, decode, lists_of, on_schedule, shared_of, start, tokens_at
from tiny_decoder import (
    LENGTHS,
    MODEL,
    NORMED,
    PUBLISHED,
    SHARED_KV,
    TAILED,
    oracle_rows,
    params,
    prefill_rows,
    random_rows,
    vary,
)

from hshare_jax.decode_state import count_reads, init_state
from hshare_jax.decode_step import decode_step
from hshare_jax.methods import double_sparsity, exact_topk
from hshare_jax.methods.base import identity_plan
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.methods.hshare.share_plan import SharePlan, kv_layer_plan
from hshare_jax.shapes import EMPTY

BUDGET = HShareSettings(num_sinks=2, num_critical=6, num_recent=4, label_channels=3, min_length=0)
F32 = 1e-4  # absolute, on float32 logits of about 5 after four layers, against float64
WINDOWED = dataclasses.replace(MODEL, windows=(None, 20, 9, None))


counted = jax.jit(count_reads, static_argnums=1)


def prefilled_logits(rows, steps, lengths=LENGTHS, **settings):
    """The logits [steps, B, V] of every step, each computed by a prefill of all tokens so far."""
    ends = [[length + step + 1 for length in lengths] for step in range(steps)]
    return np.stack(
        [
            np.asarray(prefill_rows([row[:n] for row, n in zip(rows, end, strict=True)], method=None, **settings)[0])
            for end in ends
        ]
    )


def test_cached_decode_equals_full_forward():
    rows = random_rows(1, more=4)
    logits, state = decode(rows, start(rows, method=None), 4)
    np.testing.assert_allclose(logits, prefilled_logits(rows, 4), atol=SAME, rtol=0)
    assert state.cache.lengths.tolist() == [length + 4 for length in LENGTHS]


# In LENGTHS the row of 1 token starts below the sinks and grows past the budget of 12. The row of 5 starts below sinks
# and recent tokens and grows past them. The row of 11 starts below the budget. The last row is longer.
WHOLE = {
    "published": (MODEL, PUBLISHED, LENGTHS),
    "units": (MODEL, TAILED, LENGTHS),
    "units, shared KV, norms of queries and keys, gate": (NORMED, vary(TAILED, min_length=20), LENGTHS),
    "published, shared KV, dense layers": (SHARED_KV, vary(PUBLISHED, dense_layers=1), LENGTHS),
    "anchors, shared KV, exact, no dense layers": (
        SHARED_KV,
        vary(
            TAILED,
            plan_kind="anchors",
            layer_ratio=Fraction(1, 2),
            head_ratio=Fraction(1),
            scoring="exact",
            dense_layers=0,
            tail_rank=2,
        ),
        LENGTHS,
    ),
    "units, windows, 8 bits, budget ratio": (
        WINDOWED,
        vary(TAILED, label_bits=8, budget_ratio=Fraction(1, 6), dense_layers=0, tail_rank=1),
        LENGTHS,
    ),
    "units of a batch, query heads, not quantised, gate": (
        MODEL,
        vary(TAILED, label_bits=None, min_length=20, plan_scope="batch", lists_per="query_head"),
        (3, 24, 11, 60),
    ),
    "published of a batch, dense layer, exact, dilated": (
        MODEL,
        vary(PUBLISHED, scoring="exact", dense_layers=1, plan_scope="batch", dilate=True),
        (3, 24, 13, 60),
    ),
    "units, shared KV, exact, one recent token, no sinks": (
        SHARED_KV,
        vary(TAILED, scoring="exact", num_sinks=0, num_recent=1, tail_rank=2),
        LENGTHS,
    ),
    "units, windows, pools": (WINDOWED, vary(TAILED, pool=2, tail_rank=1, dense_layers=0), LENGTHS),
    "published, shared KV, exact, pools, gate": (
        SHARED_KV,
        vary(PUBLISHED, scoring="exact", pool=3, min_length=20, tail="fitted"),
        LENGTHS,
    ),
    "exact top-k": (MODEL, exact_topk(BUDGET), LENGTHS),
    "double sparsity, windows": (WINDOWED, double_sparsity(BUDGET), LENGTHS),
}


@pytest.mark.parametrize(("config", "method", "lengths"), WHOLE.values(), ids=WHOLE)
def test_a_whole_shared_decode_equals_the_oracle(config, method, lengths):
    steps, rows = 14, random_rows(2, lengths, more=14)
    state = start(rows, lengths, method=method, config=config)
    J = method.settings.num_lists(config)
    shared_rows = oracle_rows([row[:n] for row, n in zip(rows, lengths, strict=True)], method, config)
    plans = [[[divmod(flat, J) for flat in layer] for layer in row] for row in shared_of(state).source.tolist()]
    assert plans == [row.source for row in shared_rows]
    is_shared = [plan != [[(layer, j) for j in range(J)] for layer in range(MODEL.num_layers)] for plan in plans]
    if method.sharing_ratio == "1-1-1":
        assert not any(is_shared)
    else:
        assert is_shared == ([True] * 4 if method.search.plan_scope == "batch" else [False, False, False, True])
    for step in range(steps):
        refresh = on_schedule(step) if method is TAILED else None
        logits, state = decode_step(
            params(config), tokens_at(rows, lengths, step), state, config=config, refresh=refresh
        )
        expected = np.stack([row.decode(rows[b][lengths[b] + step]) for b, row in enumerate(shared_rows)])
        np.testing.assert_allclose(logits, expected, atol=F32, rtol=0)
        lists, reads = lists_of(state), counted(state, config)
        for b, shared_row in enumerate(shared_rows):
            assert shared_of(state).recent_start[b] == shared_row.recent_start
            assert [[lists[layer][b][j] for j in range(J)] for layer in range(MODEL.num_layers)] == shared_row.lists
            np.testing.assert_allclose(reads[b], shared_row.num_read, rtol=SAME)


def test_where_nothing_is_shared_every_step_chooses_its_own_lists():
    # Three ways agree: the ratio 1-1-1, a refresh at every step under the identity plan, and the oracle without a plan.
    rows, steps = random_rows(20, more=6), 6
    single = TAILED.with_sharing_ratio("1-1-1")
    own, state = decode(rows, start(rows, method=single), steps)
    begun = start(rows, method=vary(TAILED, dilate=False, layer_ratio=Fraction(1), head_ratio=Fraction(1)))
    identity = identity_plan(len(rows), MODEL.num_layers, MODEL.num_kv_heads)
    np.testing.assert_array_equal(shared_of(begun).source, identity)
    others, same = decode(rows, begun, steps, refresh=lambda step: True)
    np.testing.assert_array_equal(shared_of(state).token_indices, shared_of(same).token_indices)
    np.testing.assert_allclose(own, others, atol=SAME, rtol=0)
    prompts = [row[:n] for row, n in zip(rows, LENGTHS, strict=True)]
    shared_rows = oracle_rows(prompts, single, plan=None, interval=1, is_dilated=False)
    for step in range(steps):
        expected = [row.decode(rows[b][LENGTHS[b] + step]) for b, row in enumerate(shared_rows)]
        np.testing.assert_allclose(own[step], np.stack(expected), atol=F32, rtol=0)
    lists = lists_of(state)
    assert [[lists[layer][b] for layer in range(MODEL.num_layers)] for b in range(len(rows))] == [
        row.lists for row in shared_rows
    ]


# Layer 0 is dense. Layer 1 computes two lists, and the layers above copy them.
PLAN = SharePlan(((0, 1, 2), (3, 4, 3), (4, 3, 3), (3, 4, 4)))


def test_a_constant_plan_decodes_as_the_same_plan_as_data():
    rows, steps = random_rows(22, more=7), 7
    prompts = [row[:n] for row, n in zip(rows, LENGTHS, strict=True)]
    planned = dataclasses.replace(TAILED, plan=PLAN)
    constant, of_constant = decode(rows, prefill_rows(prompts, method=planned)[1], steps)
    state, tails = start(rows, method=TAILED), shared_of(start(rows, method=planned)).tails
    source = np.tile(np.asarray(PLAN.source, np.int32), (len(rows), 1, 1))
    shared = dataclasses.replace(shared_of(state), source=jnp.asarray(source), tails=tails)
    data, of_data = decode(rows, dataclasses.replace(state, method_state=shared), steps)
    np.testing.assert_array_equal(constant.argmax(axis=-1), data.argmax(axis=-1))
    np.testing.assert_allclose(constant, data, atol=SAME, rtol=0)
    np.testing.assert_array_equal(shared_of(of_constant).token_indices, shared_of(of_data).token_indices)
    np.testing.assert_array_equal(shared_of(of_constant).source, source)


@pytest.mark.parametrize("rank", [0, 2])
def test_tails_are_fitted_to_a_constant_plan(rank):
    rows, steps, method = random_rows(26, more=4), 4, vary(TAILED, tail_rank=rank)
    logits, _ = decode(rows, start(rows, method=dataclasses.replace(method, plan=PLAN)), steps)
    shared_rows = oracle_rows([row[:n] for row, n in zip(rows, LENGTHS, strict=True)], method, plan=None)
    for shared_row in shared_rows:
        shared_row.take_plan([[divmod(unit, MODEL.num_kv_heads) for unit in of_layer] for of_layer in PLAN.source])
    for step in range(steps):
        expected = [row.decode(rows[b][LENGTHS[b] + step]) for b, row in enumerate(shared_rows)]
        np.testing.assert_allclose(logits[step], np.stack(expected), atol=F32, rtol=0)


def test_tails_are_fitted_on_the_last_64_probes_of_a_row_that_has_more():
    lengths, steps = (100, 30), 2
    rows, method = random_rows(27, lengths, more=steps), vary(TAILED, num_probes=70)
    logits, _ = decode(rows, start(rows, lengths, method=method), steps, lengths=lengths)
    prompts = [row[:n] for row, n in zip(rows, lengths, strict=True)]
    shared_rows = oracle_rows(prompts, method)
    for step in range(steps):
        expected = [row.decode(rows[b][lengths[b] + step]) for b, row in enumerate(shared_rows)]
        np.testing.assert_allclose(logits[step], np.stack(expected), atol=F32, rtol=0)


def test_layers_that_share_keys_and_values_share_lists_under_their_plan():
    # Layer 1 looks up, so its lists hold earlier tokens only. Layers 2 and 3 copy the lists, but see the current token.
    plan = kv_layer_plan(SHARED_KV, TAILED.settings)
    method = dataclasses.replace(TAILED, plan=plan)
    assert plan.source == ((0, 1, 2), (3, 4, 5), (3, 4, 5), (3, 4, 5))
    rows, steps = random_rows(25, more=7), 7
    prompts = [row[:n] for row, n in zip(rows, LENGTHS, strict=True)]
    logits, _ = decode(rows, prefill_rows(prompts, method=method, config=SHARED_KV)[1], steps, config=SHARED_KV)
    shared_rows = oracle_rows(prompts, TAILED, SHARED_KV, plan=None)
    for shared_row in shared_rows:
        shared_row.take_plan([[divmod(unit, MODEL.num_kv_heads) for unit in of_layer] for of_layer in plan.source])
    for step in range(steps):
        expected = [row.decode(rows[b][LENGTHS[b] + step]) for b, row in enumerate(shared_rows)]
        np.testing.assert_allclose(logits[step], np.stack(expected), atol=F32, rtol=0)


def test_labels_keep_the_given_channels():
    rows = random_rows(23)
    channels = np.stack([np.random.default_rng(2).permutation(8)[:5] for _ in range(12)]).reshape(4, 3, 5)
    shared = shared_of(prefill_rows(rows, method=dataclasses.replace(TAILED, channels=channels))[1])
    np.testing.assert_array_equal(shared.channels, np.tile(np.sort(channels[:, :, :3], axis=-1), (4, 1, 1, 1)))


def test_a_second_turn_finds_its_plan_anew_and_refreshes_first():
    rows, turn = random_rows(18, more=2), random_rows(19, (20, 1, 40, 3))
    shared_rows = oracle_rows([row[:n] for row, n in zip(rows, LENGTHS, strict=True)], TAILED)
    for b, shared_row in enumerate(shared_rows):
        for token in rows[b][LENGTHS[b] :]:  # two steps of three, so the next step would reuse the lists
            shared_row.decode(token)
        shared_row.prefill(turn[b])
    _, state = decode(rows, start(rows, method=TAILED), 2)
    _, state = prefill_rows(turn, method=TAILED, state=state)
    for token in (7, 11, 13, 17):
        logits, state = decode_step(params(), jnp.full((4,), token, jnp.int32), state, config=MODEL)
        expected = np.stack([shared_row.decode(token) for shared_row in shared_rows])
        np.testing.assert_allclose(logits, expected, atol=F32, rtol=0)
        assert shared_of(state).recent_start.tolist() == [shared_row.recent_start for shared_row in shared_rows]


def test_without_refreshes_the_recent_range_slides_and_holds_the_current_token():
    rows, steps = random_rows(3, more=30), 30
    state = start(rows, method=TAILED)
    shared_rows = oracle_rows([row[:n] for row, n in zip(rows, LENGTHS, strict=True)], TAILED)
    for step in range(steps):
        logits, state = decode_step(params(), tokens_at(rows, LENGTHS, step), state, config=MODEL, refresh=step == 0)
        expected = [row.decode(rows[b][LENGTHS[b] + step], is_refresh=step == 0) for b, row in enumerate(shared_rows)]
        np.testing.assert_allclose(logits, np.stack(expected), atol=F32, rtol=0)
        length, first = np.asarray(state.cache.lengths), np.asarray(shared_of(state).recent_start)
        assert (first < length).all()
        assert (length - first <= TAILED.settings.max_recent).all()


@pytest.mark.parametrize("method", [None, TAILED], ids=["dense", "shared"])
def test_bfloat16_decode_errs_no_more_than_twice_the_bfloat16_forward(method):
    rows = random_rows(10, more=6)
    exact = prefilled_logits(rows, 6)
    low = prefilled_logits(rows, 6, dtype="bfloat16")
    method = None if method is None else vary(TAILED, num_critical=120)  # reads every token, so `exact` is right
    state = start(rows, method=method, dtype="bfloat16")
    logits, state = decode(rows, state, 6, dtype="bfloat16")
    assert logits.dtype == np.float32
    assert {array.dtype for array in state.cache.keys} == {jnp.dtype(jnp.bfloat16)}
    assert np.abs(logits - exact).max() <= 2 * np.abs(low - exact).max() + 1e-5


def test_a_scan_in_a_users_own_jit_equals_the_loop():
    rows = random_rows(11, more=7)
    tokens = jnp.stack([tokens_at(rows, LENGTHS, step) for step in range(7)])

    @jax.jit
    def run(params, state, tokens):
        def step(state, token):
            logits, state = decode_step(params, token, state, config=MODEL)
            return state, logits

        return jax.lax.scan(step, state, tokens)

    state, logits = run(params(), start(rows, method=TAILED), tokens)
    expected, looped = decode(rows, start(rows, method=TAILED), 7)
    np.testing.assert_allclose(logits, expected, atol=SAME, rtol=0)
    np.testing.assert_array_equal(shared_of(state).token_indices, shared_of(looped).token_indices)


def test_lists_that_copy_stay_empty_and_read_their_source():
    rows = random_rows(12, more=2)
    state = start(rows, method=TAILED)
    # A plan made by hand: all layers read the lists of layer 1, in which the third list copies the first.
    source = jnp.tile(jnp.asarray([3, 4, 3], jnp.int32), (4, MODEL.num_layers, 1))
    state = dataclasses.replace(state, method_state=dataclasses.replace(shared_of(state), source=source))
    _, state = decode(rows, state, 2)
    lists = np.asarray(shared_of(state).token_indices)
    assert (lists[[0, 2, 3]] == EMPTY).all()  # layer 0 is dense
    assert (lists[1, :, 2] == EMPTY).all()
    assert (lists[1, 3, :2] != EMPTY).all()  # the lists of the long row


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("tokens", "is_active", "message"),
    [
        (np.zeros(1, np.int32), None, r"tokens is int32\[1\]; for this state it must be \[2\] of dtype integer"),
        (np.zeros((2, 1), np.int32), None, r"tokens is int32\[2, 1\]; for this state it must be \[2\]"),
        (np.zeros(2, np.float32), None, r"tokens is float32\[2\]; for this state it must be \[2\] of dtype integer"),
        (np.zeros(2, np.int32), np.array([2, 0], np.int32), r"is_active is int32\[2\]; .* of dtype bool"),
    ],
)
def test_an_argument_of_the_wrong_shape_or_dtype_is_named(tokens, is_active, message):
    with pytest.raises(ValueError, match=message):
        decode_step(params(), tokens, init_state(MODEL, 2, 8), config=MODEL, is_active=is_active)
