"""The decode step equals the full forward pass and the float64 oracle, in every row independently."""

import dataclasses
from fractions import Fraction

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import (
    CAPACITY,
    LENGTHS,
    MODEL,
    PUBLISHED,
    SHARED_KV,
    oracle_rows,
    params,
    prefill_rows,
    random_rows,
    vary,
)
from tiny_decoder import TAILED as HSHARE

from hshare_jax.decode_state import DecodeState, count_reads, init_state
from hshare_jax.decode_step import decode_step
from hshare_jax.kernels.tail import LOW
from hshare_jax.methods import double_sparsity, exact_topk
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.methods.hshare.share_plan import SharePlan, identity_plan, kv_layer_plan
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.shapes import EMPTY

BUDGET = HShareSettings(num_sinks=2, num_critical=6, num_recent=4, label_channels=3, min_length=0)
F32 = 1e-4  # absolute, on float32 logits of about 5 after four layers, against float64
SAME = 1e-5  # between two float32 programs of the same model
WINDOWED = dataclasses.replace(MODEL, windows=(None, 20, 9, None))
WIDE = vary(HSHARE, num_critical=120)  # more than any row here holds
GATED = vary(HSHARE, min_length=30)
INTERVAL = HSHARE.settings.refresh_interval


def shared_of(state: DecodeState) -> SharedLists:
    assert isinstance(state.method_state, SharedLists)
    return state.method_state


def tokens_at(rows, lengths, step):
    return jnp.asarray([row[length + step] for row, length in zip(rows, lengths, strict=True)], jnp.int32)


def start(rows, lengths=LENGTHS, **settings):
    """The state after the first `lengths` tokens of the rows."""
    return prefill_rows([row[:length] for row, length in zip(rows, lengths, strict=True)], **settings)[1]


def decode(rows, state, steps, *, lengths=LENGTHS, config=MODEL, dtype="float32", refresh=lambda step: None):
    """Decodes the next tokens of the rows: (logits [steps, B, V], the state after the last step)."""
    found = []
    for step in range(steps):
        logits, state = decode_step(
            params(config, dtype), tokens_at(rows, lengths, step), state, config=config, refresh=refresh(step)
        )
        found.append(np.asarray(logits))
    return np.stack(found), state


def on_schedule(step):
    return step % INTERVAL == 0


counted = jax.jit(count_reads, static_argnums=1)


def lists_of(state):
    """The lists [L][B][J] without their padding, as Python lists."""
    return [
        [[[t for t in tokens if t != EMPTY] for tokens in of_row] for of_row in of_layer]
        for of_layer in shared_of(state).token_indices.tolist()
    ]


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
    "units": (MODEL, HSHARE, LENGTHS),
    "units, shared KV, gate": (SHARED_KV, vary(HSHARE, min_length=20), LENGTHS),
    "published, shared KV, dense layers": (SHARED_KV, vary(PUBLISHED, dense_layers=1), LENGTHS),
    "anchors, shared KV, exact, no dense layers": (
        SHARED_KV,
        vary(
            HSHARE,
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
        vary(HSHARE, label_bits=8, budget_ratio=Fraction(1, 6), dense_layers=0, tail_rank=1),
        LENGTHS,
    ),
    "units of a batch, query heads, not quantised, gate": (
        MODEL,
        vary(HSHARE, label_bits=None, min_length=20, plan_scope="batch", lists_per="query_head"),
        (3, 24, 11, 60),
    ),
    "anchors": (
        MODEL,
        vary(HSHARE, plan_kind="anchors", layer_ratio=Fraction(1, 2), head_ratio=Fraction(1)),
        LENGTHS,
    ),
    "published of a batch, dense layer, exact, dilated": (
        MODEL,
        vary(PUBLISHED, scoring="exact", dense_layers=1, plan_scope="batch", dilate=True),
        (3, 24, 13, 60),
    ),
    "units, shared KV, exact, one recent token, no sinks": (
        SHARED_KV,
        vary(HSHARE, scoring="exact", num_sinks=0, num_recent=1, tail_rank=2),
        LENGTHS,
    ),
    "units, no tail": (MODEL, vary(HSHARE, tail=None), LENGTHS),
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
        refresh = on_schedule(step) if method is HSHARE else None
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
    single = HSHARE.with_sharing_ratio("1-1-1")
    own, state = decode(rows, start(rows, method=single), steps)
    begun = start(rows, method=vary(HSHARE, dilate=False, layer_ratio=Fraction(1), head_ratio=Fraction(1)))
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
        sparse, _ = decode(rows, start(rows, lengths, method=HSHARE), steps, lengths=lengths)
        np.testing.assert_allclose(gated[:, ~below], sparse[:, ~below], atol=SAME, rtol=0)
        assert np.abs(sparse[:, ~below] - dense[:, ~below]).max() > 100 * SAME  # rows above the gate are not dense


# Layer 0 is dense. Layer 1 computes two lists, and the layers above copy them.
PLAN = SharePlan(((0, 1, 2), (3, 4, 3), (4, 3, 3), (3, 4, 4)))


def test_a_constant_plan_decodes_as_the_same_plan_as_data():
    rows, steps = random_rows(22, more=7), 7
    prompts = [row[:n] for row, n in zip(rows, LENGTHS, strict=True)]
    planned = dataclasses.replace(HSHARE, plan=PLAN)
    constant, of_constant = decode(rows, prefill_rows(prompts, method=planned)[1], steps)
    state, tails = start(rows, method=HSHARE), shared_of(start(rows, method=planned)).tails
    source = np.tile(np.asarray(PLAN.source, np.int32), (len(rows), 1, 1))
    shared = dataclasses.replace(shared_of(state), source=jnp.asarray(source), tails=tails)
    data, of_data = decode(rows, dataclasses.replace(state, method_state=shared), steps)
    np.testing.assert_array_equal(constant.argmax(axis=-1), data.argmax(axis=-1))
    np.testing.assert_allclose(constant, data, atol=SAME, rtol=0)
    np.testing.assert_array_equal(shared_of(of_constant).token_indices, shared_of(of_data).token_indices)
    np.testing.assert_array_equal(shared_of(of_constant).source, source)


@pytest.mark.parametrize("rank", [0, 2])
def test_tails_are_fitted_to_a_constant_plan(rank):
    rows, steps, method = random_rows(26, more=4), 4, vary(HSHARE, tail_rank=rank)
    logits, _ = decode(rows, start(rows, method=dataclasses.replace(method, plan=PLAN)), steps)
    shared_rows = oracle_rows([row[:n] for row, n in zip(rows, LENGTHS, strict=True)], method, plan=None)
    for shared_row in shared_rows:
        shared_row.take_plan([[divmod(unit, MODEL.num_kv_heads) for unit in of_layer] for of_layer in PLAN.source])
    for step in range(steps):
        expected = [row.decode(rows[b][LENGTHS[b] + step]) for b, row in enumerate(shared_rows)]
        np.testing.assert_allclose(logits[step], np.stack(expected), atol=F32, rtol=0)


@pytest.mark.parametrize("num_probes", ["all", 70])
def test_tails_are_fitted_on_every_second_probe_of_a_row_that_has_more_than_64(num_probes):
    lengths, steps = (100, 30), 2
    rows, method = random_rows(27, lengths, more=steps), vary(HSHARE, num_probes=num_probes)
    logits, _ = decode(rows, start(rows, lengths, method=method), steps, lengths=lengths)
    prompts = [row[:n] for row, n in zip(rows, lengths, strict=True)]
    shared_rows = oracle_rows(prompts, method)
    for step in range(steps):
        expected = [row.decode(rows[b][lengths[b] + step]) for b, row in enumerate(shared_rows)]
        np.testing.assert_allclose(logits[step], np.stack(expected), atol=F32, rtol=0)


def test_layers_that_share_keys_and_values_share_lists_under_their_plan():
    # Layer 1 looks up, so its lists hold earlier tokens only. Layers 2 and 3 copy the lists, but see the current token.
    plan = kv_layer_plan(SHARED_KV, HSHARE.settings)
    method = dataclasses.replace(HSHARE, plan=plan)
    assert plan.source == ((0, 1, 2), (3, 4, 5), (3, 4, 5), (3, 4, 5))
    rows, steps = random_rows(25, more=7), 7
    prompts = [row[:n] for row, n in zip(rows, LENGTHS, strict=True)]
    logits, _ = decode(rows, prefill_rows(prompts, method=method, config=SHARED_KV)[1], steps, config=SHARED_KV)
    shared_rows = oracle_rows(prompts, HSHARE, SHARED_KV, plan=None)
    for shared_row in shared_rows:
        shared_row.take_plan([[divmod(unit, MODEL.num_kv_heads) for unit in of_layer] for of_layer in plan.source])
    for step in range(steps):
        expected = [row.decode(rows[b][LENGTHS[b] + step]) for b, row in enumerate(shared_rows)]
        np.testing.assert_allclose(logits[step], np.stack(expected), atol=F32, rtol=0)


def test_labels_keep_the_given_channels():
    rows = random_rows(23)
    channels = np.stack([np.random.default_rng(2).permutation(8)[:5] for _ in range(12)]).reshape(4, 3, 5)
    shared = shared_of(prefill_rows(rows, method=dataclasses.replace(HSHARE, channels=channels))[1])
    np.testing.assert_array_equal(shared.channels, np.tile(np.sort(channels[:, :, :3], axis=-1), (4, 1, 1, 1)))


def test_a_second_turn_finds_its_plan_anew_and_refreshes_first():
    rows, turn = random_rows(18, more=2), random_rows(19, (20, 1, 40, 3))
    shared_rows = oracle_rows([row[:n] for row, n in zip(rows, LENGTHS, strict=True)], HSHARE)
    for b, shared_row in enumerate(shared_rows):
        for token in rows[b][LENGTHS[b] :]:  # two steps of three, so the next step would reuse the lists
            shared_row.decode(token)
        shared_row.prefill(turn[b])
    _, state = decode(rows, start(rows, method=HSHARE), 2)
    _, state = prefill_rows(turn, method=HSHARE, state=state)
    for token in (7, 11, 13, 17):
        logits, state = decode_step(params(), jnp.full((4,), token, jnp.int32), state, config=MODEL)
        expected = np.stack([shared_row.decode(token) for shared_row in shared_rows])
        np.testing.assert_allclose(logits, expected, atol=F32, rtol=0)
        assert shared_of(state).recent_start.tolist() == [shared_row.recent_start for shared_row in shared_rows]


def test_without_refreshes_the_recent_range_slides_and_holds_the_current_token():
    rows, steps = random_rows(3, more=30), 30
    state = start(rows, method=HSHARE)
    shared_rows = oracle_rows([row[:n] for row, n in zip(rows, LENGTHS, strict=True)], HSHARE)
    for step in range(steps):
        logits, state = decode_step(params(), tokens_at(rows, LENGTHS, step), state, config=MODEL, refresh=step == 0)
        expected = [row.decode(rows[b][LENGTHS[b] + step], is_refresh=step == 0) for b, row in enumerate(shared_rows)]
        np.testing.assert_allclose(logits, np.stack(expected), atol=F32, rtol=0)
        length, first = np.asarray(state.cache.lengths), np.asarray(shared_of(state).recent_start)
        assert (first < length).all()
        assert (length - first <= HSHARE.settings.max_recent).all()


@pytest.mark.parametrize("method", [None, HSHARE, vary(PUBLISHED, num_probes=4)], ids=["dense", "units", "published"])
def test_a_row_in_a_ragged_batch_equals_the_row_alone(method):
    rows = random_rows(24, more=7)
    started = start(rows, method=method)
    source = None if method is None else np.asarray(shared_of(started).source)
    logits, state = decode(rows, started, 7)
    for b, length in enumerate(LENGTHS):
        alone = start([rows[b]], [length], method=method)
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
    tails = shared_of(start(rows, method=HSHARE)).tails
    assert all(tail is not None and (tail.terms[3, :, LOW] > -100).all() for tail in tails[1:])
    without, _ = decode(rows, start(rows, method=WIDE), 4)
    state = start(rows, method=WIDE)
    state = dataclasses.replace(state, method_state=dataclasses.replace(shared_of(state), tails=tails))
    found, _ = decode(rows, state, 4)
    np.testing.assert_array_equal(found, without)


def test_rows_that_refresh_by_age_equal_the_static_schedule():
    rows = random_rows(6, more=7)
    by_age, of_ages = decode(rows, start(rows, method=HSHARE), 7)
    static, of_static = decode(rows, start(rows, method=HSHARE), 7, refresh=on_schedule)
    np.testing.assert_array_equal(by_age, static)
    for one, other in zip(jax.tree.leaves(of_ages), jax.tree.leaves(of_static), strict=True):
        np.testing.assert_array_equal(one, other)


def test_rows_of_different_age_refresh_at_different_steps():
    rows = random_rows(7, more=8)
    state = start(rows, method=HSHARE)
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
    _, state = decode(rows, start(rows, method=HSHARE), 1)
    kept = [np.asarray(leaf).copy() for leaf in jax.tree.leaves(state)]
    found = []
    for step in range(1, 4):
        tokens = tokens_at(rows, LENGTHS, step)
        logits, state = decode_step(params(), tokens, state, config=MODEL, is_active=is_active)
        found.append(np.asarray(logits))
    expected, everyone = decode(rows, start(rows, method=HSHARE), 4)
    np.testing.assert_allclose(np.stack(found)[:, ::2], expected[1:, ::2], atol=SAME, rtol=0)
    for leaf, was, other in zip(jax.tree.leaves(state), kept, jax.tree.leaves(everyone), strict=True):
        axis = 1 if leaf is shared_of(state).token_indices else 0
        now, was, other = (np.moveaxis(np.asarray(array), axis, 0) for array in (leaf, was, other))
        np.testing.assert_array_equal(now[1::2], was[1::2])
        np.testing.assert_allclose(now[::2], other[::2], atol=SAME, rtol=0)
    assert state.cache.lengths.tolist() == [5, 6, 15, 61]


@pytest.mark.parametrize("method", [None, HSHARE], ids=["dense", "shared"])
def test_a_full_row_yields_nan_and_leaves_the_others_alone(method):
    lengths = (CAPACITY, *LENGTHS[1:])
    rows = random_rows(9, lengths, more=5)
    logits, state = decode(rows, start(rows, lengths, method=method), 5, lengths=lengths)
    assert np.isnan(logits[:, 0]).all()
    expected, _ = decode(rows, start(rows, lengths, method=method, capacity=CAPACITY + 8), 5, lengths=lengths)
    np.testing.assert_allclose(logits[:, 1:], expected[:, 1:], atol=SAME, rtol=0)
    assert np.isfinite(np.asarray(state.cache.keys[0])).all()


@pytest.mark.parametrize("method", [None, HSHARE], ids=["dense", "shared"])
def test_bfloat16_decode_errs_no_more_than_twice_the_bfloat16_forward(method):
    rows = random_rows(10, more=6)
    exact = prefilled_logits(rows, 6)
    low = prefilled_logits(rows, 6, dtype="bfloat16")
    method = None if method is None else WIDE  # WIDE reads every token, so `exact` is right for both
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

    state, logits = run(params(), start(rows, method=HSHARE), tokens)
    expected, looped = decode(rows, start(rows, method=HSHARE), 7)
    np.testing.assert_allclose(logits, expected, atol=SAME, rtol=0)
    np.testing.assert_array_equal(shared_of(state).token_indices, shared_of(looped).token_indices)


def test_lists_that_copy_stay_empty_and_read_their_source():
    rows = random_rows(12, more=2)
    state = start(rows, method=HSHARE)
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
