"""Patterns: overlaps of lists, layers and steps equal a plain count, and the plan is the one that decoding follows."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import row_oracle
from tiny_decoder import HSHARE, MODEL, oracle_budget, oracle_row, oracle_rows, params, random_rows, vary

from hshare_jax.calibration import find_plans
from hshare_jax.evaluation.patterns import Patterns, check_prompt, measure_patterns, overlap_of_steps
from hshare_jax.models.pretrained import Model

EXACT = 1e-6  # the counts are whole numbers; only their division rounds
STEPS = 4
TINY = Model(MODEL, params(), None, (), "tiny", "0" * 16)
(ROW,) = random_rows(5, lengths=(60,))
PROMPT = ROW.tolist()
READ = len(PROMPT) - 2 * STEPS  # what is prefilled


@pytest.fixture(scope="module")
def found() -> Patterns:
    return measure_patterns(TINY, PROMPT, method=HSHARE, steps=STEPS)


def test_lists_and_layers_overlap_as_counted_at_the_probes(found: Patterns) -> None:
    (row,) = oracle_rows([ROW[:READ]], vary(HSHARE, plan_kind="published"))
    assert row.similarity is not None
    of_layers, of_heads = row.similarity
    np.testing.assert_allclose(found.layer_overlap, of_layers, atol=EXACT, rtol=0)
    np.testing.assert_allclose(found.head_overlap, of_heads, atol=EXACT, rtol=0)
    assert (found.head_overlap[0] == 0).all()  # dense
    assert (np.diagonal(found.head_overlap[1:], axis1=1, axis2=2) == 1).all()


def test_steps_overlap_as_counted_while_decoding_alone(found: Patterns) -> None:
    budget = dataclasses.replace(oracle_budget(HSHARE), plan=None, interval=1, is_dilated=False)
    alone = row_oracle.SharedRow(oracle_row(), budget)
    alone.prefill(ROW[:READ])
    lists = []
    for token in PROMPT[READ:]:
        alone.decode(token)
        lists.append([[set(tokens) for tokens in of_layer] for of_layer in alone.lists])
    expected = np.zeros((STEPS, MODEL.num_layers))
    for layer in range(HSHARE.settings.num_dense, MODEL.num_layers):
        pairs = range(MODEL.num_kv_heads)
        listed = sum(len(lists[t][layer][j]) for t in range(STEPS) for j in pairs)
        for d in range(1, STEPS + 1):
            kept = sum(len(lists[t][layer][j] & lists[t + d][layer][j]) for t in range(STEPS) for j in pairs)
            expected[d - 1, layer] = kept / listed
    assert found.step_overlap.shape == expected.shape
    np.testing.assert_allclose(found.step_overlap, expected, atol=EXACT, rtol=0)
    assert 0 < expected[0, 1:].min() < 1


@pytest.mark.parametrize("plan_kind", ["units", "published", "anchors"])
def test_the_plan_is_the_one_that_decoding_follows(plan_kind: str) -> None:
    ratio = Fraction(1) if plan_kind == "anchors" else HSHARE.search.head_ratio
    method = vary(HSHARE, plan_kind=plan_kind, head_ratio=ratio)
    patterns = measure_patterns(TINY, PROMPT, method=method, steps=0)
    assert [patterns.plan] == find_plans(TINY, [PROMPT], method=method)
    assert patterns.step_overlap.shape == (0, MODEL.num_layers)


def test_patterns_of_a_method_that_shares_nothing_are_those_of_one_that_does(found: Patterns) -> None:
    single = vary(HSHARE, tail=None, layer_ratio=Fraction(1), head_ratio=Fraction(1))
    alone = measure_patterns(TINY, PROMPT, method=single, steps=STEPS)
    assert alone.plan.is_computed.all()
    np.testing.assert_array_equal(alone.layer_overlap, found.layer_overlap)


def test_a_list_is_compared_with_itself_later() -> None:
    # One list of each of two layers, at three steps; the first layer has none.
    lists = np.array([[[-1, -1], [1, 2]], [[-1, -1], [2, 3]], [[-1, -1], [3, 4]]], np.int32)[:, :, None]
    np.testing.assert_array_equal(overlap_of_steps(lists, 1), [[0, 0.5]])
    np.testing.assert_array_equal(overlap_of_steps(lists, 2), [[0, 0.5], [0, 0]])  # from the first step alone
    # Two lists, one of them of a single token: 2 of 3 are left.
    lists = np.array([[[[1, 2], [5, -1]]], [[[1, 3], [5, 6]]]], np.int32)
    np.testing.assert_allclose(overlap_of_steps(lists, 1), [[2 / 3]], atol=EXACT)


@pytest.mark.parametrize("num_distances", [0, 2])
def test_distances_lie_within_the_steps(num_distances: int) -> None:
    with pytest.raises(ValueError, match=f"num_distances={num_distances} must lie between 1 and 1"):
        overlap_of_steps(np.zeros((2, 1, 1, 1), np.int32), num_distances)


def test_what_cannot_be_measured_is_refused_before_anything_is_computed() -> None:
    first = HSHARE.settings.first_probe
    check_prompt(MODEL, first + 1, settings=HSHARE.settings, steps=0)
    with pytest.raises(ValueError, match=rf"the prompt has {first} tokens; it needs {first + 1}, with twice"):
        measure_patterns(TINY, PROMPT[:first], method=HSHARE, steps=0)
    with pytest.raises(ValueError, match=rf"it needs {first + 1 + 1000}, .*, and 2 \* 500 that are decoded"):
        measure_patterns(TINY, PROMPT, method=HSHARE, steps=500)
    with pytest.raises(ValueError, match="the prompt's 1025 tokens are beyond the model's 1024"):
        check_prompt(MODEL, 1025, settings=HSHARE.settings, steps=0)
    with pytest.raises(ValueError, match="steps=-1 must be at least 0"):
        measure_patterns(TINY, PROMPT, method=HSHARE, steps=-1)
