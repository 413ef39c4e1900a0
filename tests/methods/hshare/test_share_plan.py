"""Greedy maps, sources, anchors and share plans equal the definitions, which are written from the papers."""

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

from hshare_jax.methods.hshare.settings import HShareSettings, PlanSearch
from hshare_jax.methods.hshare.share_plan import (
    SharePlan,
    choose_anchors,
    choose_sources,
    compose,
    find_plan,
    greedy_map,
    identity_plan,
)
from hshare_jax.models.config import ModelConfig

find = jax.jit(find_plan, static_argnames=("config", "settings", "search"))
L, J = 5, 3
CONFIG = ModelConfig(16, 8, 8, L, 6, J, 4, 64, (None,) * L)
SETTINGS = HShareSettings(dense_layers=0)
PUBLISHED = PlanSearch(plan_kind="published", layer_ratio=Fraction(1, 2), head_ratio=Fraction(2, 3))
UNITS = dataclasses.replace(PUBLISHED, plan_kind="units")
# Few values give ties, and 0 gives pairs that share nothing. Sums of eighths are exact in float32 and in float64.
SIMILARITIES = st.sampled_from([0.0, 0.0, 0.25, 0.5, 0.75, 1.0])
EIGHTHS = st.integers(0, 8).map(lambda eighths: eighths / 8)
SQUARES = st.integers(1, 5).flatmap(lambda n: hnp.arrays(np.float32, (n, n), elements=SIMILARITIES | EIGHTHS))


@jax.jit
def all_maps(similarity):
    """The greedy maps for 0, 1, ... n shared units, although at most n - 1 units can share."""
    return [greedy_map(similarity, num_shared) for num_shared in range(len(similarity) + 1)]


@jax.jit
def all_sources(similarity):
    """The source of each unit if 1, 2, ... n units are computed."""
    return [choose_sources(similarity, num_sources) for num_sources in range(1, len(similarity) + 1)]


@jax.jit
def all_anchors(similarity):
    """The anchor of each unit if 1, 2, ... n units are anchors."""
    return [choose_anchors(similarity, num_anchors) for num_anchors in range(1, len(similarity) + 1)]


@hypothesis.given(SQUARES)
def test_anchors_catch_the_most_of_all_choices(caught):
    n = len(caught)
    for num_anchors, found in enumerate(all_anchors(jnp.asarray(caught)), start=1):
        copies, best = found.tolist(), oracle.anchors(caught, num_anchors)
        chosen = sorted(set(copies))
        assert (chosen[0], len(chosen)) == (0, num_anchors)
        assert copies == [max(anchor for anchor in chosen if anchor <= unit) for unit in range(n)]
        assert sum(caught[i, a] for i, a in enumerate(copies)) == sum(caught[i, a] for i, a in enumerate(best))


def test_the_papers_worked_example():
    similarity = np.zeros((4, 4), np.float32)
    similarity[1, 0], similarity[2, 1], similarity[3, 2] = 0.9, 0.8, 0.7
    similarity[2, 0], similarity[3, 0], similarity[3, 1] = 0.3, 0.2, 0.1
    maps = [found.tolist() for found in all_maps(jnp.asarray(similarity))]
    assert maps[:3] == [[0, 1, 2, 3], [0, 0, 2, 3], [0, 0, 2, 2]]


def test_a_unit_follows_the_unit_that_it_copies():
    # Unit 2 copies unit 1. Then unit 1 copies unit 0, and so does unit 2. Unit 3 can no longer copy unit 1.
    similarity = np.zeros((4, 4), np.float32)
    similarity[2, 1], similarity[1, 0], similarity[3, 1] = 0.9, 0.8, 0.7
    assert all_maps(jnp.asarray(similarity))[3].tolist() == [0, 0, 0, 3]


def test_on_ties_the_first_pair_in_row_major_order_is_taken():
    maps = all_maps(jnp.ones((4, 4)))
    assert (maps[1].tolist(), maps[3].tolist()) == ([0, 0, 2, 3], [0, 0, 0, 0])


def test_where_nothing_is_similar_nothing_is_shared():
    assert all_maps(jnp.eye(4))[3].tolist() == [0, 1, 2, 3]


@hypothesis.settings(max_examples=1000)
@hypothesis.given(
    similarity=SQUARES | hnp.arrays(np.float32, (5, 5), elements=st.floats(0, 1, width=32, allow_subnormal=False))
)
def test_greedy_maps_equal_algorithm_1(similarity):
    for num_shared, found in enumerate(all_maps(jnp.asarray(similarity))):
        copies = found.tolist()
        assert copies == oracle.greedy_map(similarity, num_shared)
        assert all(copies[source] == source <= unit for unit, source in enumerate(copies))
        assert sum(source != unit for unit, source in enumerate(copies)) <= num_shared


def test_the_worked_example_of_sources():
    # The first source is unit 0. The second is unit 2, because it gains .8 for itself and .8 for unit 3.
    caught = np.eye(4, dtype=np.float32)
    caught[1, 0], caught[2, 0], caught[2, 1], caught[3, 2] = 0.9, 0.2, 0.3, 0.8
    found = [copies.tolist() for copies in all_sources(jnp.asarray(caught))]
    assert found == [[0, 0, 0, 0], [0, 0, 2, 2], [0, 0, 2, 3], [0, 1, 2, 3]]


def test_a_unit_that_catches_little_itself_is_worth_no_list():
    # Unit 0 serves unit 1 badly, but as a source unit 1 would gain only .05. Unit 2 gains .4, so it is a source.
    caught = np.array([[1, 0, 0], [0.05, 0.1, 0], [0.6, 0.2, 1]], np.float32)
    assert all_sources(jnp.asarray(caught))[1].tolist() == [0, 0, 2]


@hypothesis.settings(max_examples=1000)
@hypothesis.given(similarity=SQUARES)
def test_sources_equal_the_greedy_definition(similarity):
    for index, found in enumerate(all_sources(jnp.asarray(similarity))):
        copies = found.tolist()
        assert copies == oracle.facility_location(similarity, index + 1)
        assert sum(source == unit for unit, source in enumerate(copies)) == index + 1
        assert all(copies[source] == source <= unit for unit, source in enumerate(copies))


@pytest.mark.parametrize(("n", "num_sources"), [(12, 1), (12, 5), (30, 7)])
def test_sources_of_many_units_equal_the_greedy_definition(n, num_sources):
    rng = np.random.default_rng(n + num_sources)
    # Sums of sixty-fourths are exact, so float32 and float64 have the same ties.
    similarity = (rng.integers(0, 65, (8, n, n)) / 64).astype(np.float32)
    found = jax.jit(jax.vmap(lambda matrix: choose_sources(matrix, num_sources)))(jnp.asarray(similarity))
    assert found.tolist() == [oracle.facility_location(matrix, num_sources) for matrix in similarity]


def budget_of(search, dense_layers=0, num_lists=J):
    return oracle.Budget(
        1, 1, 1, num_lists, dense_layers=dense_layers, layer_ratio=search.layer_ratio, head_ratio=search.head_ratio
    )


def as_pairs(source):
    return [[divmod(flat, J) for flat in of_layer] for of_layer in np.asarray(source).tolist()]


def check_plan(source):
    """Fails unless the source of every list is a computed list, at or below the list."""
    flat = np.asarray(source).reshape(len(source), L * J)
    np.testing.assert_array_equal(np.take_along_axis(flat, flat, axis=1), flat)
    assert (flat <= np.arange(L * J)[None, :]).all()


PUBLISHED_CASES = [  # the search, and the number of dense layers
    (PUBLISHED, 0),
    (dataclasses.replace(PUBLISHED, layer_ratio=Fraction(1, 100), head_ratio=Fraction(1, 100)), 0),
    (PUBLISHED, 2),
    (dataclasses.replace(PUBLISHED, layer_ratio=Fraction(1)), 1),
    (PUBLISHED, L),
]


@pytest.mark.parametrize(("search", "dense"), PUBLISHED_CASES)
@hypothesis.given(
    layers=hnp.arrays(np.float32, (2, L, L), elements=SIMILARITIES),
    lists=hnp.arrays(np.float32, (2, L, J, J), elements=SIMILARITIES),
)
def test_published_plans_equal_the_layer_map_over_the_list_maps(search, dense, layers, lists):
    settings = HShareSettings(dense_layers=dense)
    layers[:, :dense] = layers[:, :, :dense] = lists[:, :dense] = 0  # dense layers have no lists
    source = find((jnp.asarray(layers), jnp.asarray(lists)), config=CONFIG, settings=settings, search=search)
    check_plan(source)
    for b in range(2):
        assert as_pairs(source[b]) == oracle.published_plan(layers[b], lists[b], budget_of(search, dense))
    own = np.arange(dense * J).reshape(1, dense, J)
    np.testing.assert_array_equal(source[:, :dense], np.tile(own, (2, 1, 1)))
    assert (np.asarray(source)[:, dense:] >= dense * J).all()


UNITS_CASES = [
    (UNITS, 0),
    (dataclasses.replace(UNITS, layer_ratio=Fraction(3, 4)), 1),
    (dataclasses.replace(UNITS, layer_ratio=Fraction(1, 100)), 3),  # one list is computed
    (dataclasses.replace(UNITS, layer_ratio=Fraction(1), head_ratio=Fraction(1)), 0),
    (UNITS, L),
]


@pytest.mark.parametrize(("search", "dense"), UNITS_CASES)
@hypothesis.given(caught=hnp.arrays(np.float32, (2, L * J, L * J), elements=EIGHTHS))
def test_unit_plans_equal_the_definition(search, dense, caught):
    settings = HShareSettings(dense_layers=dense)
    caught[:, : dense * J] = caught[:, :, : dense * J] = 0  # dense layers have no lists
    caught[1] = 0  # a row without probes
    source = np.asarray(find(jnp.asarray(caught), config=CONFIG, settings=settings, search=search))
    check_plan(source)
    assert as_pairs(source[0]) == oracle.units_plan(caught[0], L, budget_of(search, dense))
    identity = np.asarray(identity_plan(1, L, J)[0])
    np.testing.assert_array_equal(source[1], identity)
    np.testing.assert_array_equal(source[0, :dense], identity[:dense])
    assert (source[0, dense:] >= dense * J).all()
    if caught[0].max() > 0:
        assert (source[0] == identity)[dense:].sum() == search.num_computed_lists(settings, CONFIG)


@pytest.mark.parametrize("search", [PUBLISHED, UNITS], ids=["published", "units"])
def test_a_batch_has_the_plan_of_the_mean_over_its_rows_with_probes(search):
    rng = np.random.default_rng(3)
    batch = dataclasses.replace(search, plan_scope="batch")
    shapes = [(3, L, L), (3, L, J, J)] if search.plan_kind == "published" else [(3, L * J, L * J)]
    parts = [(rng.integers(0, 9, shape) / 8).astype(np.float32) for shape in shapes]
    for part in parts:
        part[1] = 0  # a row without probes does not count
    means = [part[[0, 2]].mean(axis=0) for part in parts]
    given = tuple(map(jnp.asarray, parts)) if search.plan_kind == "published" else jnp.asarray(parts[0])
    source = find(given, config=CONFIG, settings=SETTINGS, search=batch)
    if search.plan_kind == "published":
        expected = oracle.published_plan(means[0], means[1], budget_of(search))
    else:
        expected = oracle.units_plan(means[0], L, budget_of(search))
    assert [as_pairs(of_row) for of_row in source] == [expected] * 3
    apart = np.asarray(find(given, config=CONFIG, settings=SETTINGS, search=search))
    assert len({of_row.tobytes() for of_row in apart}) == 3
    nothing = find(jax.tree.map(jnp.zeros_like, given), config=CONFIG, settings=SETTINGS, search=batch)
    np.testing.assert_array_equal(nothing, identity_plan(3, L, J))


def test_a_copying_layer_does_not_use_its_own_list_map():
    list_maps = jnp.asarray([[0, 0, 2], [0, 1, 1], [0, 1, 2]])
    assert compose(jnp.asarray([0, 0, 2]), list_maps).tolist() == [[0, 0, 2], [0, 0, 2], [6, 7, 8]]


def test_a_row_without_similarities_keeps_the_identity():
    layers = jnp.stack([jnp.zeros((L, L)), jnp.ones((L, L))])
    lists = jnp.stack([jnp.zeros((L, J, J)), jnp.ones((L, J, J))])
    source = find((layers, lists), config=CONFIG, settings=SETTINGS, search=PUBLISHED)
    np.testing.assert_array_equal(source[0], identity_plan(2, L, J)[0])
    assert (np.asarray(source[1]) != np.asarray(source[0])).any()


@pytest.mark.parametrize("num_layers", [1, 4])
def test_the_identity_plan_numbers_lists_layer_by_layer(num_layers):
    plan = identity_plan(2, num_layers, J)
    assert plan.tolist() == [[[layer * J + j for j in range(J)] for layer in range(num_layers)]] * 2
    assert plan.dtype == jnp.int32


def test_a_constant_plan_is_hashable_and_knows_which_lists_are_computed():
    plan = SharePlan(((0, 1), (0, 3), (0, 3)))
    assert plan == SharePlan(((0, 1), (0, 3), (0, 3)))
    assert len({plan, SharePlan(((0, 1), (0, 3), (0, 3)))}) == 1
    assert plan.is_computed.tolist() == [[True, True], [False, True], [False, False]]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ((), "source must hold the same number of lists, at least one, for every layer"),
        (((), ()), "source must hold the same number of lists"),
        (((0, 1), (2,)), "source must hold the same number of lists"),
        (((0, 1), (2,), (3, 4, 5)), "source must hold the same number of lists"),
        (((0, 1), (2, 5)), r"source\[1\]\[1\]=5 must be a flat id from 0 to its own, 3: a list copies a lower one"),
        (((1, 1),), r"source\[0\]\[0\]=1 must be a flat id from 0 to its own, 0"),
        (((0, -1),), r"source\[0\]\[1\]=-1 must be a flat id from 0 to its own, 1"),
        (((0, 0), (1, 3)), r"source\[1\]\[0\]=1 must be a list that is computed, but that one copies 0"),
    ],
)
def test_an_invalid_constant_plan_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        SharePlan(source)


@pytest.mark.usefixtures("unchecked")
def test_a_constant_plan_of_lists_is_hashable_too():
    assert hash(SharePlan([[0, 1], [0, 3]])) == hash(SharePlan(((0, 1), (0, 3))))  # pyright: ignore[reportArgumentType]


def constant(num_layers, num_lists, **changes):
    flat = {unit: unit for unit in range(num_layers * num_lists)} | {int(k[1:]): v for k, v in changes.items()}
    return SharePlan(tuple(tuple(flat[i * num_lists + j] for j in range(num_lists)) for i in range(num_layers)))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (constant(4, 3), "the plan is for 4 layers of 3 lists; this model with lists_per='kv_head' has 5 layers of 3"),
        (constant(5, 6), "the plan is for 5 layers of 6 lists; this model with lists_per='kv_head' has 5 layers of 3"),
        (
            constant(5, 3, u9=1),
            "the plan copies from the first 1 layers, which are dense and have no lists; calibrate with dense_layers=1",
        ),
    ],
)
def test_a_constant_plan_of_another_model_or_setting_is_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        plan.check(CONFIG, HShareSettings(dense_layers=1))


@pytest.mark.parametrize("plan", [constant(5, 3), constant(5, 3, u9=4), constant(5, 3, u1=0)])
def test_a_constant_plan_of_this_model_is_accepted(plan):
    plan.check(CONFIG, HShareSettings(dense_layers=1))
