"""Critical tokens: the highest scores among the candidates, ascending, ties to the lower slot, padded with EMPTY."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from hshare_jax.config import HShareConfig
from hshare_jax.critical_tokens import find_critical_tokens, pool_scores, select_tokens
from hshare_jax.kernels.reference import EMPTY
from hshare_jax.labels import take_channels

F32 = 1e-6  # absolute, on weights of at most 1
S = 16


def listed(row):
    """Returns the tokens of a padded list; fails if the padding is not at its end."""
    tokens = [slot for slot in row.tolist() if slot != EMPTY]
    assert row.tolist() == tokens + [EMPTY] * (len(row) - len(tokens))
    return tokens


@hypothesis.given(
    scores=st.lists(st.integers(-2, 2), min_size=2 * S, max_size=2 * S),  # few values: ties everywhere
    candidates=st.sets(st.integers(0, S - 1)),
)
def test_selection_equals_the_definition_with_ties_and_few_candidates(scores, candidates):
    values = np.array(scores, np.float32).reshape(1, 2, S)
    mask = np.isin(np.arange(S), sorted(candidates))[None, :]
    chosen = np.asarray(select_tokens(jnp.asarray(values), jnp.asarray(mask), 5))
    for j in range(2):
        assert listed(chosen[0, j]) == oracle.select(values[0, j], candidates, 5)


@pytest.mark.parametrize("num_critical", [1, S - 1, S, S + 1, 40])
def test_a_list_longer_than_the_candidates_holds_all_of_them(num_critical):
    scores = jnp.asarray(np.random.default_rng(1).standard_normal((1, 1, S)), jnp.float32)
    chosen = select_tokens(scores, jnp.ones((1, S), bool), num_critical)
    assert chosen.shape == (1, 1, num_critical)
    assert listed(np.asarray(chosen)[0, 0]) == oracle.select(np.asarray(scores)[0, 0], range(S), num_critical)


def test_without_candidates_a_list_is_empty():
    chosen = select_tokens(jnp.zeros((1, 2, S)), jnp.zeros((1, S), bool), 4)
    assert (np.asarray(chosen) == EMPTY).all()


@pytest.mark.parametrize(("N", "J"), [(4, 2), (6, 3), (4, 1)])
def test_pooled_scores_are_sums_of_softmaxed_ones(N, J):
    rng = np.random.default_rng(2)
    scores = (rng.standard_normal((2, N, S)) * 4).astype(np.float32)
    candidates = [{3}, {1, 4, 5, 9, 14}]
    mask = np.stack([np.isin(np.arange(S), sorted(slots)) for slots in candidates])
    pooled = np.asarray(pool_scores(jnp.asarray(scores), jnp.asarray(mask), J))
    for b, slots in enumerate(candidates):
        np.testing.assert_allclose(
            pooled[b][:, sorted(slots)],
            oracle.pooled(scores[b].astype(np.float64), slots, J)[:, sorted(slots)],
            atol=F32,
            rtol=0,
        )


def test_one_list_per_head_keeps_its_scores():
    scores = jnp.asarray(np.random.default_rng(3).standard_normal((2, 4, S)), jnp.float32)
    np.testing.assert_array_equal(pool_scores(scores, jnp.ones((2, S), bool), 4), scores)


def test_a_loud_head_does_not_outvote_the_others_of_its_group():
    # One head prefers slot 0 on a scale of thousands, two prefer slot 1 on their own scale.
    scores = jnp.asarray([[[1050.0, 1000.0, 0.0], [0.0, 5.0, 0.0], [0.0, 5.0, 0.0]]])
    pooled = pool_scores(scores, jnp.ones((1, 3), bool), 1)
    assert int(pooled[0, 0].argmax()) == 1
    assert int(scores.sum(axis=1)[0].argmax()) == 0


@pytest.mark.parametrize("window", [None, 1, 6, 12])
@pytest.mark.parametrize("num_lists", [2, 4])
def test_lists_equal_the_definition_in_rows_of_every_length(num_lists, window):
    # 2 sinks and 3 recent: rows up to 5 have no candidates, up to 9 fewer than 4.
    rng = np.random.default_rng(4)
    lengths = np.array([1, 2, 4, 5, 6, 8, 9, 10, S])
    B, N, K, H, R = len(lengths), 4, 2, 8, 3
    q, keys = (rng.standard_normal(shape).astype(np.float32) for shape in ((B, N, H), (B, K, S, H)))
    channels = np.sort([[rng.permutation(H)[:R] for _ in range(K)] for _ in range(B)], axis=-1)
    labels = take_channels(jnp.asarray(keys), jnp.asarray(channels))
    config = HShareConfig(num_sinks=2, num_critical=4, num_recent=3)
    chosen = find_critical_tokens(
        jnp.asarray(q), labels, jnp.asarray(channels), jnp.asarray(lengths),
        num_lists=num_lists, config=config, window=window,
    )  # fmt: skip
    budget = oracle.Budget(2, 4, 3, num_lists, R, 1, 1, 0, 0)
    for b, length in enumerate(lengths):
        expected = oracle.critical_tokens(q[b].astype(np.float64), keys[b], channels[b], int(length), budget, window)
        assert [listed(row) for row in np.asarray(chosen)[b]] == expected


def test_the_worked_example_has_five_candidates():
    # length 8, 1 sink, 2 recent:  slots 0 | 1 2 3 4 5 | 6 7
    config = HShareConfig(num_sinks=1, num_critical=9, num_recent=2)
    ones = jnp.ones((1, 1, S, 2))
    chosen = find_critical_tokens(
        ones[:, :, 0], ones, jnp.asarray([[[0, 1]]]), jnp.asarray([8]), num_lists=1, config=config
    )
    assert listed(np.asarray(chosen)[0, 0]) == [1, 2, 3, 4, 5]
