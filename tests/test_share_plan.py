"""The share plan: greedy maps and their composition equal Algorithm 1 written from the paper."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from hshare_jax.share_plan import compose, find_plan, greedy_map, identity_plan

greedy = jax.jit(greedy_map, static_argnames="num_shared")
find = jax.jit(find_plan, static_argnames=("num_shared_layers", "num_shared_lists"))
L, J = 5, 3
# Few values, and 0 among them: ties and pairs that share nothing.
SIMILARITIES = st.sampled_from([0.0, 0.0, 0.25, 0.5, 0.75, 1.0])


def test_the_papers_worked_example():
    similarity = np.zeros((4, 4), np.float32)
    similarity[1, 0], similarity[2, 1], similarity[3, 2] = 0.9, 0.8, 0.7
    similarity[2, 0], similarity[3, 0], similarity[3, 1] = 0.3, 0.2, 0.1
    assert greedy(jnp.asarray(similarity), 2).tolist() == [0, 0, 2, 2]
    assert greedy(jnp.asarray(similarity), 1).tolist() == [0, 0, 2, 3]
    assert greedy(jnp.asarray(similarity), 0).tolist() == [0, 1, 2, 3]


def test_what_copied_a_unit_follows_it():
    # 2 copies 1; then 1 copies 0, and 2 with it; 1 is out, so nothing copies it any more.
    similarity = np.zeros((4, 4), np.float32)
    similarity[2, 1], similarity[1, 0], similarity[3, 1] = 0.9, 0.8, 0.7
    assert greedy(jnp.asarray(similarity), 3).tolist() == [0, 0, 0, 3]


def test_on_ties_the_first_pair_in_row_major_order_is_taken():
    assert greedy(jnp.ones((4, 4)), 1).tolist() == [0, 0, 2, 3]
    assert greedy(jnp.ones((4, 4)), 3).tolist() == [0, 0, 0, 0]


def test_where_nothing_is_similar_nothing_is_shared():
    assert greedy(jnp.eye(5), 4).tolist() == [0, 1, 2, 3, 4]


@hypothesis.given(
    similarity=st.integers(1, 7).flatmap(
        lambda n: hnp.arrays(
            np.float32, (n, n), elements=SIMILARITIES | st.floats(0, 1, width=32, allow_subnormal=False)
        )
    ),
    num_shared=st.integers(0, 7),
)
def test_greedy_maps_equal_algorithm_1(similarity, num_shared):
    found = greedy(jnp.asarray(similarity), num_shared).tolist()
    assert found == oracle.greedy_map(similarity, num_shared)
    assert all(found[source] == source <= unit for unit, source in enumerate(found))
    assert sum(source != unit for unit, source in enumerate(found)) <= num_shared


@hypothesis.given(
    layers=hnp.arrays(np.float32, (2, L, L), elements=SIMILARITIES),
    lists=hnp.arrays(np.float32, (2, L, J, J), elements=SIMILARITIES),
    num_shared=st.sampled_from([(0, 0), (0, 1), (2, 0), (2, 1), (4, 2)]),
)
def test_plans_equal_the_layer_map_over_the_list_maps(layers, lists, num_shared):
    source = np.asarray(
        find(jnp.asarray(layers), jnp.asarray(lists), num_shared_layers=num_shared[0], num_shared_lists=num_shared[1])
    )
    for b in range(2):
        expected = oracle.plan(layers[b], lists[b], *num_shared)
        assert [[divmod(flat, J) for flat in of_layer] for of_layer in source[b].tolist()] == expected
    # Every list is read from one that is its own source, in a layer that is not above.
    own = np.take_along_axis(source.reshape(2, L * J), source.reshape(2, L * J), axis=1).reshape(2, L, J)
    np.testing.assert_array_equal(own, source)
    assert (source // J <= np.arange(L)[None, :, None]).all()


def test_a_copying_layer_does_not_use_its_own_list_map():
    list_maps = jnp.asarray([[0, 0, 2], [0, 1, 1], [0, 1, 2]])
    assert compose(jnp.asarray([0, 0, 2]), list_maps).tolist() == [[0, 0, 2], [0, 0, 2], [6, 7, 8]]


def test_a_row_without_similarities_keeps_the_identity():
    layers = jnp.stack([jnp.zeros((L, L)), jnp.ones((L, L))])
    lists = jnp.stack([jnp.zeros((L, J, J)), jnp.ones((L, J, J))])
    source = find(layers, lists, num_shared_layers=2, num_shared_lists=1)
    np.testing.assert_array_equal(source[0], identity_plan(2, L, J)[0])
    assert (np.asarray(source[1]) != np.asarray(source[0])).any()


@pytest.mark.parametrize("num_layers", [1, 4])
def test_the_identity_plan_numbers_lists_layer_by_layer(num_layers):
    plan = identity_plan(2, num_layers, J)
    assert plan.tolist() == [[[layer * J + j for j in range(J)] for layer in range(num_layers)]] * 2
    assert plan.dtype == jnp.int32
