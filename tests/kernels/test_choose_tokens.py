"""The choice of tokens: how the scores of a group's heads become one list."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from hshare_jax.kernels.choose_tokens import choose_tokens, dilate_weights, pool_scores
from hshare_jax.shapes import EMPTY

F32 = 1e-6  # absolute, on weights of at most 1
S = 16


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


def test_one_list_per_head_keeps_the_scores_of_its_head():
    scores = jnp.asarray(np.random.default_rng(3).standard_normal((2, 4, S)), jnp.float32)
    np.testing.assert_array_equal(pool_scores(scores, jnp.ones((2, S), bool), 4), scores)


def test_a_loud_head_does_not_outvote_the_others_of_its_group():
    # One head prefers slot 0 on a scale of thousands. Two heads prefer slot 1 on a small scale.
    scores = jnp.asarray([[[1050.0, 1000.0, 0.0], [0.0, 5.0, 0.0], [0.0, 5.0, 0.0]]])
    pooled = pool_scores(scores, jnp.ones((1, 3), bool), 1)
    assert int(pooled[0, 0].argmax()) == 1
    assert int(scores.sum(axis=1)[0].argmax()) == 0


def test_dilated_weights_are_the_larger_of_two_neighbours():
    weights = jnp.asarray([[[1.0, 5.0, 2.0, -jnp.inf, -3.0, -3.5]]])
    assert dilate_weights(weights).tolist() == [[[1.0, 5.0, 5.0, 2.0, -3.0, -3.0]]]


@pytest.mark.parametrize("J", [2, 4])
@pytest.mark.parametrize("dilate", [False, True])
@pytest.mark.parametrize("is_bounded", [False, True])
def test_lists_equal_the_definition_for_every_range(J, dilate, is_bounded):
    rng = np.random.default_rng(4)
    ranges = [(0, 0), (3, 3), (5, 2), (2, 3), (2, 6), (0, S), (7, S), (0, S + 9)]  # none, one, few, and all compete
    scores = (rng.standard_normal((len(ranges), 4, S)) * 2).astype(np.float32)
    allowed = rng.integers(0, 5, len(ranges)) if is_bounded else np.full(len(ranges), 4)
    first, last = np.transpose(ranges)
    lists = choose_tokens(
        *map(jnp.asarray, (scores, first, last)), jnp.asarray(allowed) if is_bounded else None,
        num_lists=J, num_critical=4, dilate=dilate,
    )  # fmt: skip
    for b, j in np.ndindex(len(ranges), J):
        candidates = set(range(first[b], min(last[b], S)))
        weights = oracle.pooled(scores[b].astype(np.float64), candidates, J)[j]
        weights = oracle.dilated(weights, candidates) if dilate else weights
        expected = oracle.select(weights, candidates, allowed[b])
        assert lists[b, j].tolist() == expected + [EMPTY] * (4 - len(expected))
