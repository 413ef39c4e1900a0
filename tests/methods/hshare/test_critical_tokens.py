"""Critical tokens: the highest scores among the candidates, ascending, ties to the lower slot, padded with EMPTY."""

import dataclasses
from fractions import Fraction

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from hshare_jax.shapes import EMPTY
from hshare_jax.methods.hshare.critical_tokens import (
    dilate,
    find_critical_tokens,
    num_critical_in_budget,
    pool_scores,
    select_tokens,
)
from hshare_jax.methods.hshare.settings import HShareSettings

F32 = 1e-6  # absolute, on weights of at most 1
S = 16
CONFIG = HShareSettings(num_sinks=2, num_critical=4, num_recent=3, dilate=False)
# Ties, both zeros, the largest and the smallest normal numbers, neighbours in the last bit, and nothing at all.
SCORES = [
    0.0, -0.0, 1.0, float(np.nextafter(np.float32(1), np.float32(2))), -1.0, 2.5, -2.5, 3e38, -3e38, 2e-38, -2e-38,
    -float("inf"), 65536.0, 65537.0,
]  # fmt: skip
select = jax.jit(select_tokens, static_argnames="num_critical")
find = jax.jit(find_critical_tokens, static_argnames=("num_lists", "config"))


def listed(row):
    """Returns the tokens of a padded list; fails if the padding is not at its end."""
    tokens = [slot for slot in row.tolist() if slot != EMPTY]
    assert row.tolist() == tokens + [EMPTY] * (len(row) - len(tokens))
    return tokens


# Not a multiple of the lanes' 128, either side of it; lists shorter and longer than the slots.
@pytest.mark.parametrize(("num_slots", "num_critical"), [(S, 5), (S, 24), (130, 40)])
@hypothesis.settings(max_examples=300)
@hypothesis.given(data=st.data())
def test_selection_equals_the_definition_whatever_the_scores(num_slots, num_critical, data):
    elements = st.sampled_from(SCORES) | st.floats(
        width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False
    )
    values = data.draw(hnp.arrays(np.float32, (2, 2, num_slots), elements=elements))
    mask = data.draw(hnp.arrays(np.bool_, (2, num_slots)))
    allowed = data.draw(st.lists(st.integers(0, num_critical), min_size=2, max_size=2))
    chosen = np.asarray(select(jnp.asarray(values), jnp.asarray(mask), num_critical, jnp.asarray(allowed)))
    for b, j in np.ndindex(2, 2):
        candidates = set(np.flatnonzero(mask[b]).tolist())
        assert listed(chosen[b, j]) == oracle.select(values[b, j].tolist(), candidates, allowed[b])


@pytest.mark.parametrize("num_critical", [1, 128, 5000])
def test_selection_from_a_long_row_with_many_ties_equals_the_definition(num_critical):
    rng = np.random.default_rng(5)
    scores = np.round(rng.standard_normal((2, 3, 4096)), 1).astype(np.float32)
    mask = rng.random((2, 4096)) < 0.9
    chosen = np.asarray(select(jnp.asarray(scores), jnp.asarray(mask), num_critical))
    for b, j in np.ndindex(2, 3):
        candidates = set(np.flatnonzero(mask[b]).tolist())
        assert listed(chosen[b, j]) == oracle.select(scores[b, j].tolist(), candidates, num_critical)


@pytest.mark.parametrize("num_critical", [1, S, S + 1])
def test_a_list_longer_than_the_candidates_holds_all_of_them(num_critical):
    scores = jnp.asarray(np.random.default_rng(1).standard_normal((1, 1, S)), jnp.float32)
    chosen = select(scores, jnp.ones((1, S), bool), num_critical)
    assert chosen.shape == (1, 1, num_critical)
    assert listed(np.asarray(chosen)[0, 0]) == oracle.select(np.asarray(scores)[0, 0], range(S), num_critical)


def test_without_candidates_a_list_is_empty():
    chosen = select(jnp.zeros((1, 2, S)), jnp.zeros((1, S), bool), 4)
    assert (np.asarray(chosen) == EMPTY).all()


def test_scores_of_slots_that_do_not_compete_may_be_anything():
    scores = jnp.full((1, 1, S), jnp.nan).at[0, 0, 3:6].set(jnp.asarray([1.0, 3.0, 2.0]))
    is_candidate = jnp.zeros((1, S), bool).at[0, 3:6].set(True)
    assert listed(np.asarray(select(scores, is_candidate, 2))[0, 0]) == [4, 5]


@pytest.mark.parametrize(("N", "J"), [(4, 2), (6, 3), (4, 1)])
def test_pooled_scores_are_sums_of_softmaxed_ones(N, J):
    rng = np.random.default_rng(2)
    scores = (rng.standard_normal((2, N, S)) * 4).astype(np.float32)
    candidates = [{3}, {1, 4, 5, 9, 14}]
    mask = np.stack([np.isin(np.arange(S), sorted(slots)) for slots in candidates])
    pooled = np.asarray(pool_scores(jnp.asarray(scores), jnp.asarray(mask), J))
    for b, slots in enumerate(candidates):
        expected = oracle.pooled(scores[b].astype(np.float64), slots, J)
        np.testing.assert_allclose(pooled[b][:, sorted(slots)], expected[:, sorted(slots)], atol=F32, rtol=0)


def test_one_list_per_head_keeps_its_scores():
    scores = jnp.asarray(np.random.default_rng(3).standard_normal((2, 4, S)), jnp.float32)
    np.testing.assert_array_equal(pool_scores(scores, jnp.ones((2, S), bool), 4), scores)


def test_a_loud_head_does_not_outvote_the_others_of_its_group():
    # One head prefers slot 0 on a scale of thousands, two prefer slot 1 on their own scale.
    scores = jnp.asarray([[[1050.0, 1000.0, 0.0], [0.0, 5.0, 0.0], [0.0, 5.0, 0.0]]])
    pooled = pool_scores(scores, jnp.ones((1, 3), bool), 1)
    assert int(pooled[0, 0].argmax()) == 1
    assert int(scores.sum(axis=1)[0].argmax()) == 0


SETTINGS = {
    "plain": CONFIG,
    "dilated": dataclasses.replace(CONFIG, dilate=True, refresh_interval=2),
    "budget ratio": dataclasses.replace(CONFIG, budget_ratio=Fraction(1, 2)),
    "dilated, budget ratio": dataclasses.replace(CONFIG, dilate=True, budget_ratio=Fraction(5, 9)),
}


@pytest.mark.parametrize("num_lists", [2, 4])
@pytest.mark.parametrize("config", SETTINGS.values(), ids=SETTINGS)
def test_lists_equal_the_definition_in_rows_of_every_length(config, num_lists):
    # 2 sinks and 3 recent: rows up to 5 have no candidates, up to 9 fewer than 4.
    rng = np.random.default_rng(4)
    lengths = np.array([1, 2, 4, 5, 6, 8, 9, 10, 14, S])
    scores = (rng.standard_normal((len(lengths), 4, S)) * 2).astype(np.float32)
    budget = oracle.Budget(
        2, 4, 3, num_lists, interval=config.refresh_interval, is_dilated=config.dilate, ratio=config.budget_ratio
    )
    for window in (None, 1, 6, 12) if config is CONFIG else (1, 6, 12, S):
        chosen = find(
            jnp.asarray(scores), jnp.asarray(lengths), num_lists=num_lists, config=config,
            window=None if window is None else jnp.asarray(window),
        )  # fmt: skip
        for b, length in enumerate(lengths.tolist()):
            expected = oracle.critical_tokens(scores[b].astype(np.float64), length, budget, window)
            assert [listed(row) for row in np.asarray(chosen)[b]] == expected


def test_the_worked_example_has_five_candidates():
    # length 8, 1 sink, 2 recent:  slots 0 | 1 2 3 4 5 | 6 7
    config = HShareSettings(num_sinks=1, num_critical=9, num_recent=2)
    chosen = find(jnp.ones((1, 1, S)), jnp.asarray([8]), num_lists=1, config=config)
    assert listed(np.asarray(chosen)[0, 0]) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"dilate": True, "refresh_interval": 2}, [5, 6]),  # the token after a good one comes with it
        ({"dilate": True, "refresh_interval": 1}, [5, 8]),  # nothing later reuses the list
        ({"dilate": False, "refresh_interval": 2}, [5, 8]),
    ],
)
def test_lists_are_dilated_only_where_later_steps_reuse_them(settings, expected):
    config = HShareSettings(num_sinks=2, num_critical=2, num_recent=3, **settings)
    scores = jnp.zeros((1, 1, S)).at[0, 0, jnp.asarray([5, 8])].set(jnp.asarray([3.0, 2.0]))
    chosen = find(scores, jnp.asarray([S]), num_lists=1, config=config)
    assert listed(np.asarray(chosen)[0, 0]) == expected


def test_a_sink_lends_its_score_to_no_candidate():
    # Slot 1 is a sink, and slot 9 lies before the window of 6: neither makes the slot after it worth reading.
    scores = jnp.zeros((1, 1, S)).at[0, 0, jnp.asarray([1, 9])].set(9.0).at[0, 0, 12].set(1.0)
    config = HShareSettings(num_sinks=2, num_critical=2, num_recent=3, refresh_interval=2)
    for window, expected in ((S, [9, 10]), (6, [10, 12])):
        chosen = find(scores, jnp.asarray([S]), num_lists=1, config=config, window=jnp.asarray(window))
        assert listed(np.asarray(chosen)[0, 0]) == expected


def test_dilated_scores_are_the_larger_of_two_neighbours():
    scores = jnp.asarray([[[1.0, 5.0, 2.0, -jnp.inf, -3.0, -3.5]]])
    assert dilate(scores).tolist() == [[[1.0, 5.0, 5.0, 2.0, -3.0, -3.0]]]


@pytest.mark.parametrize("ratio", [Fraction(1, 2), Fraction(1, 3), Fraction(3, 7), Fraction(1)])
def test_a_share_of_the_row_bounds_its_list(ratio):
    config = dataclasses.replace(CONFIG, budget_ratio=ratio)
    budget = oracle.Budget(2, 4, 3, 1, ratio=ratio)
    found = num_critical_in_budget(jnp.arange(1, 60), config)
    assert found is not None
    assert found.tolist() == [budget.num_listed(length) for length in range(1, 60)]
    assert min(found.tolist()) == 0
    assert max(found.tolist()) == config.num_critical


def test_without_a_share_the_three_sizes_are_the_budget():
    assert num_critical_in_budget(jnp.arange(9), CONFIG) is None
