"""Critical tokens: the slots that compete and the lists that scores choose equal the definition."""

import dataclasses
import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from hshare_jax.methods.base import identity_plan
from hshare_jax.methods.hshare.critical_tokens import choose_lists, num_critical_in_budget
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.shapes import EMPTY

S = 16
SETTINGS = HShareSettings(num_sinks=2, num_critical=4, num_recent=3, dilate=False)


@functools.partial(jax.jit, static_argnames=("num_lists", "settings", "window"))
def find(scores, lengths, *, num_lists, settings, window=None):
    """The lists [B, J, C] that these scores [B, N, S] choose: the keys are unit vectors, so a query is its scores."""
    B = scores.shape[0]
    keys = jnp.broadcast_to(jnp.eye(S), (B, num_lists, S, S)) * S**0.5
    lists = jnp.full((1, B, num_lists, settings.num_critical), EMPTY, jnp.int32)
    channels, is_due = jnp.zeros((B, num_lists, 0), jnp.int32), jnp.ones(B, bool)
    plan = identity_plan(B, 1, num_lists)
    return choose_lists(
        lists, 0, scores, keys, None, channels, plan, is_due, lengths, settings=settings, window=window
    )[0]


def listed(row):
    """The tokens of a padded list. Fails if the padding is not at the end."""
    tokens = [slot for slot in row.tolist() if slot != EMPTY]
    assert row.tolist() == tokens + [EMPTY] * (len(row) - len(tokens))
    return tokens


CASES = {
    "plain": SETTINGS,
    "dilated": dataclasses.replace(SETTINGS, dilate=True, refresh_interval=2),
    "budget ratio": dataclasses.replace(SETTINGS, budget_ratio=Fraction(1, 2)),
    "dilated, budget ratio": dataclasses.replace(SETTINGS, dilate=True, budget_ratio=Fraction(5, 9)),
}


@pytest.mark.parametrize("num_lists", [2, 4])
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_lists_equal_the_definition_in_rows_of_every_length(settings, num_lists):
    # With 2 sinks and 3 recent tokens, rows of up to 5 tokens have no candidates, and rows of up to 8 fewer than 4.
    rng = np.random.default_rng(4)
    lengths = np.array([1, 2, 4, 5, 6, 8, 9, 10, 14, S])
    scores = (rng.standard_normal((len(lengths), 4, S)) * 2).astype(np.float32)
    budget = oracle.Budget(
        2, 4, 3, num_lists, interval=settings.refresh_interval, is_dilated=settings.dilate, ratio=settings.budget_ratio
    )
    for window in (None, 1, 6, 12) if settings is SETTINGS else (1, 6, 12, S):
        chosen = find(jnp.asarray(scores), jnp.asarray(lengths), num_lists=num_lists, settings=settings, window=window)
        for b, length in enumerate(lengths.tolist()):
            expected = oracle.critical_tokens(scores[b].astype(np.float64), length, budget, window)
            assert [listed(row) for row in np.asarray(chosen)[b]] == expected


def test_the_worked_example_has_five_candidates():
    # length 8, 1 sink, 2 recent:  slots 0 | 1 2 3 4 5 | 6 7
    settings = HShareSettings(num_sinks=1, num_critical=9, num_recent=2)
    chosen = find(jnp.ones((1, 1, S)), jnp.asarray([8]), num_lists=1, settings=settings)
    assert listed(np.asarray(chosen)[0, 0]) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dilate": True, "refresh_interval": 2}, [5, 6]),  # slot 6 gets the score of slot 5
        ({"dilate": True, "refresh_interval": 1}, [5, 8]),  # no later step reuses the list
        ({"dilate": False, "refresh_interval": 2}, [5, 8]),
    ],
)
def test_lists_are_dilated_only_where_later_steps_reuse_them(changes, expected):
    settings = HShareSettings(num_sinks=2, num_critical=2, num_recent=3, **changes)
    scores = jnp.zeros((1, 1, S)).at[0, 0, jnp.asarray([5, 8])].set(jnp.asarray([3.0, 2.0]))
    chosen = find(scores, jnp.asarray([S]), num_lists=1, settings=settings)
    assert listed(np.asarray(chosen)[0, 0]) == expected


def test_a_sink_lends_its_score_to_no_candidate():
    # Slot 1 is a sink, and slot 9 lies before the window of 6. Neither slot lends its score to the next slot.
    scores = jnp.zeros((1, 1, S)).at[0, 0, jnp.asarray([1, 9])].set(9.0).at[0, 0, 12].set(1.0)
    settings = HShareSettings(num_sinks=2, num_critical=2, num_recent=3, refresh_interval=2)
    for window, expected in ((S, [9, 10]), (6, [10, 12])):
        chosen = find(scores, jnp.asarray([S]), num_lists=1, settings=settings, window=window)
        assert listed(np.asarray(chosen)[0, 0]) == expected


@pytest.mark.parametrize("ratio", [Fraction(1, 2), Fraction(1, 3), Fraction(3, 7), Fraction(1)])
def test_a_budget_ratio_bounds_the_size_of_a_list(ratio):
    settings = dataclasses.replace(SETTINGS, budget_ratio=ratio)
    budget = oracle.Budget(2, 4, 3, 1, ratio=ratio)
    found = num_critical_in_budget(jnp.arange(1, 60), settings)
    assert found is not None
    assert found.tolist() == [budget.num_listed(length) for length in range(1, 60)]
    assert min(found.tolist()) == 0
    assert max(found.tolist()) == settings.num_critical


def test_without_a_budget_ratio_num_critical_is_the_size_of_a_list():
    assert num_critical_in_budget(jnp.arange(9), SETTINGS) is None
