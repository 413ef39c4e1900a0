"""Exact top-k: the highest scores among the candidates, ascending, ties to the lower slot, padded with EMPTY."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from hshare_jax.kernels.top_k import select_tokens
from hshare_jax.shapes import EMPTY

S = 16
# Ties, both zeros, the largest and the smallest normal numbers, neighbours in the last bit, and minus infinity.
SCORES = [
    0.0, -0.0, 1.0, float(np.nextafter(np.float32(1), np.float32(2))), -1.0, 2.5, -2.5, 3e38, -3e38, 2e-38, -2e-38,
    -float("inf"), 65536.0, 65537.0,
]  # fmt: skip
select = jax.jit(select_tokens, static_argnames="num_critical")


def listed(row):
    """The tokens of a padded list. Fails if the padding is not at its end."""
    tokens = [slot for slot in row.tolist() if slot != EMPTY]
    assert row.tolist() == tokens + [EMPTY] * (len(row) - len(tokens))
    return tokens


# Slots: not a multiple of the lanes' 128, and on either side of it. Lists: shorter and longer than the slots.
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


def test_more_allowed_tokens_than_places_fill_the_places_with_the_best():
    scores = jnp.asarray(np.random.default_rng(2).standard_normal((1, 1, S)), jnp.float32)
    chosen = select(scores, jnp.ones((1, S), bool), 3, jnp.asarray([S]))
    assert listed(np.asarray(chosen)[0, 0]) == oracle.select(np.asarray(scores)[0, 0], range(S), 3)


def test_without_candidates_a_list_is_empty():
    chosen = select(jnp.zeros((1, 2, S)), jnp.zeros((1, S), bool), 4)
    assert (np.asarray(chosen) == EMPTY).all()


def test_scores_of_slots_that_do_not_compete_may_be_anything():
    scores = jnp.full((1, 1, S), jnp.nan).at[0, 0, 3:6].set(jnp.asarray([1.0, 3.0, 2.0]))
    is_candidate = jnp.zeros((1, S), bool).at[0, 3:6].set(True)
    assert listed(np.asarray(select(scores, is_candidate, 2))[0, 0]) == [4, 5]
