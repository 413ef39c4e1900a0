"""Similarity: where the probes stand, and the overlaps that are counted at them."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from hshare_jax.config import HShareConfig
from hshare_jax.labels import take_channels
from hshare_jax.models.config import ModelConfig
from hshare_jax.similarity import measure_similarity, probe_positions

EXACT = 1e-6  # the counts are whole numbers; only their division rounds
CONFIG = HShareConfig(num_sinks=2, num_critical=4, num_recent=3, num_probes=5)
positions_of = jax.jit(probe_positions, static_argnames="config")
measure = jax.jit(measure_similarity, static_argnames=("model", "config"))


def probes(start, length, config=CONFIG):
    positions, is_probe = positions_of(jnp.asarray([start]), jnp.asarray([length]), config)
    found = positions[0][is_probe[0]].tolist()
    assert positions[0].tolist() == found + [-1] * (config.num_probes - len(found))
    return found


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [
        (0, 8, []),  # the budget is 9 tokens: the ninth is the first that has 4 candidates
        (0, 9, [8]),
        (0, 10, [8, 9]),
        (0, 12, [8, 9, 10, 11]),  # fewer positions than probes: each once
        (0, 13, [8, 9, 10, 11, 12]),
        (0, 17, [8, 10, 12, 14, 16]),  # first and last, and evenly between
        (0, 18, [8, 10, 12, 14, 17]),
        (14, 15, [14]),  # a second turn: its own tokens only
        (14, 18, [14, 15, 16, 17]),
        (4, 8, []),
        (4, 10, [8, 9]),
    ],
)
def test_probes_stand_where_a_full_budget_lies_behind_them(start, length, expected):
    assert probes(start, length) == expected


def test_a_single_probe_stands_first():
    assert probes(0, 30, HShareConfig(num_sinks=2, num_critical=4, num_recent=3, num_probes=1)) == [8]


@hypothesis.given(start=st.integers(0, 300), new=st.integers(1, 300))
def test_probe_positions_equal_the_definition_in_rows_of_every_length(start, new):
    expected = oracle.probe_positions(start, start + new, oracle.Budget(2, 4, 3, 1, 1, 5, 1, 0, 0))
    assert probes(start, start + new) == expected
    assert len(set(expected)) == len(expected)


@pytest.mark.parametrize("lists_per", ["kv_head", "query_head"])
def test_similarities_equal_the_mean_overlap_over_the_probes(lists_per):
    # rows: no probe, one, fewer than asked, all; layer 1 has a window that leaves some probes fewer candidates than 4
    rng = np.random.default_rng(1)
    lengths = np.array([8, 9, 11, 24])
    N, K, H, R, S, windows = 6, 3, 8, 2, 24, (None, 6, None)
    B, L = len(lengths), len(windows)
    config = HShareConfig(num_sinks=2, num_critical=4, num_recent=3, num_probes=5, lists_per=lists_per)
    model = ModelConfig(16, 8, 8, L, N, K, H, S, windows)
    keys = rng.standard_normal((L, B, K, S, H)).astype(np.float32)
    queries = rng.standard_normal((L, B, config.num_probes, N, H)).astype(np.float32)
    channels = np.sort([[[rng.permutation(H)[:R] for _ in range(K)] for _ in range(L)] for _ in range(B)], axis=-1)
    positions, _ = probe_positions(jnp.zeros((B,), jnp.int32), jnp.asarray(lengths), config)
    labels = tuple(take_channels(jnp.asarray(keys[layer]), jnp.asarray(channels[:, layer])) for layer in range(L))
    of_layers, of_lists = measure(
        tuple(map(jnp.asarray, queries)), labels, jnp.asarray(channels), positions, model=model, config=config
    )
    J = config.num_lists(model)
    budget = oracle.Budget(2, 4, 3, J, R, config.num_probes, 1, 0, 0)
    for b in range(B):
        chosen = [
            [
                oracle.critical_tokens(
                    queries[layer, b, i].astype(np.float64), keys[layer, b], channels[b, layer], p + 1, budget,
                    windows[layer],
                )
                for layer in range(L)
            ]
            for i, p in enumerate(oracle.probe_positions(0, int(lengths[b]), budget))
        ]  # fmt: skip
        layers, lists = oracle.similarity(chosen) if chosen else (np.zeros((L, L)), np.zeros((L, J, J)))
        np.testing.assert_allclose(of_layers[b], layers, atol=EXACT, rtol=0)
        np.testing.assert_allclose(of_lists[b], lists, atol=EXACT, rtol=0)
        if chosen:
            assert (np.diagonal(lists, axis1=1, axis2=2)[[0, 2]] == 1).all()  # a full list overlaps itself wholly


@pytest.mark.parametrize("num_heads", [3, 7])
def test_equal_overlaps_are_equal_numbers(num_heads):
    # The greedy rule breaks ties by order. Overlaps that are equal must therefore be equal to the last bit, whichever
    # probes they come from: counts add up as whole numbers and are divided last.
    rng = np.random.default_rng(2)
    P, H, S = 32, 4, 64
    config = HShareConfig(num_sinks=0, num_critical=5, num_recent=1, num_probes=P, lists_per="query_head")
    model = ModelConfig(16, 8, 8, 2, num_heads, num_heads, H, S, (None,) * 2)
    queries = rng.standard_normal((2, P, num_heads, H)).astype(np.float32)
    labels = (jnp.asarray(rng.standard_normal((1, num_heads, S, H)), jnp.float32),) * 2
    channels, positions = jnp.tile(jnp.arange(H), (1, 2, num_heads, 1)), jnp.full((1, P), S - 1)

    def overlap(order):
        probes = tuple(jnp.asarray(of_layer[None, order]) for of_layer in queries)
        layers, _ = measure(probes, labels, channels, positions, model=model, config=config)
        return float(layers[0, 1, 0])

    assert len({overlap(rng.permutation(P)) for _ in range(8)}) == 1
