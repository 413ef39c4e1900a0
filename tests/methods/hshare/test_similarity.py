"""Similarity: the positions of the probes, the overlaps of lists, and the attention that lists catch."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from hshare_jax.kernels.labels import make_labels
from hshare_jax.methods.base import PromptQueries
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.methods.hshare.similarity import LabelledPrompt, measure_mass, measure_overlap, probe_positions
from hshare_jax.models.config import ModelConfig

EXACT = 1e-6  # counts are whole numbers, so only the division rounds
MASS = 1e-5  # absolute, on sums of float32 weights of a group's two heads
SETTINGS = HShareSettings(num_sinks=2, num_critical=4, num_recent=3)
NUM_PROBES = 5
positions_of = jax.jit(probe_positions, static_argnames=("settings", "num_probes"))
overlap_of = jax.jit(measure_overlap, static_argnames=("config", "settings"))
mass_of = jax.jit(measure_mass, static_argnames=("config", "settings"))


def prompt_of(probes, keys, labels, channels, positions):
    return LabelledPrompt(PromptQueries(positions, probes, (), None), keys, labels, channels)


def probes(start, length, num_probes=5):
    positions = positions_of(jnp.asarray([start]), jnp.asarray([length]), SETTINGS, num_probes)[0].tolist()
    found = [position for position in positions if position >= 0]
    assert positions == found + [-1] * (num_probes - len(found))
    return found


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [
        (0, 12, []),  # the thirteenth token is the first with 8 candidates, twice a list of 4
        (0, 13, [12]),
        (0, 14, [12, 13]),
        (0, 16, [12, 13, 14, 15]),  # fewer positions than probes, so each is a probe once
        (0, 17, [12, 13, 14, 15, 16]),
        (0, 22, [17, 18, 19, 20, 21]),  # the last ones
        (14, 15, [14]),  # a second turn has probes among the new tokens only
        (14, 18, [14, 15, 16, 17]),
        (4, 12, []),
        (4, 14, [12, 13]),
    ],
)
def test_probes_stand_where_there_are_twice_the_candidates(start, length, expected):
    assert probes(start, length) == expected


def test_a_single_probe_stands_last():
    assert probes(0, 30, 1) == [29]


def test_with_a_probe_for_every_token_each_position_is_one():
    assert probes(0, 40, 40) == list(range(12, 40))
    assert probes(20, 40, 40) == list(range(20, 40))
    assert probes(0, 60_000, 60_000) == list(range(12, 60_000))


def test_no_probes_are_asked_for_where_the_plan_is_known():
    assert probe_positions(jnp.asarray([0]), jnp.asarray([30]), SETTINGS, 0).shape == (1, 0)


@hypothesis.given(start=st.integers(0, 300), new=st.integers(1, 300))
def test_probe_positions_equal_the_definition_in_rows_of_every_length(start, new):
    expected = oracle.probe_positions(start, start + new, oracle.Budget(2, 4, 3, 1, num_probes=5))
    assert probes(start, start + new) == expected
    assert len(set(expected)) == len(expected)


# The rows have no probe, one probe, fewer probes than asked, and all. In the window of layer 1 some probes have fewer
# than 4 candidates.
LENGTHS, N, K, H, R, S, WINDOWS = np.array([12, 13, 15, 24]), 6, 3, 8, 3, 24, (None, 6, None)
B, L = len(LENGTHS), len(WINDOWS)
CONFIG = ModelConfig(16, 8, 8, L, N, K, H, S, WINDOWS)
PUBLISHED = dataclasses.replace(SETTINGS, lists_per="query_head", dense_layers=0, dilate=False)
CASES = {
    "overlap": (overlap_of, PUBLISHED),
    "overlap, dense layer, kv heads": (
        overlap_of,
        dataclasses.replace(PUBLISHED, lists_per="kv_head", dense_layers=1),
    ),
    "mass": (mass_of, SETTINGS),
    "mass, query heads, no dense layer, 8 bits": (
        mass_of,
        dataclasses.replace(SETTINGS, lists_per="query_head", dense_layers=0, label_bits=8),
    ),
    "mass, exact": (mass_of, dataclasses.replace(SETTINGS, scoring="exact")),
}


@pytest.mark.parametrize(("measure", "settings"), CASES.values(), ids=CASES)
def test_similarities_equal_the_definition(measure, settings):
    rng = np.random.default_rng(1)
    keys = rng.standard_normal((L, B, K, S, H)).astype(np.float32)
    queries = (rng.standard_normal((L, B, NUM_PROBES, N, H)) * 2).astype(np.float32)
    channels = np.sort([[[rng.permutation(H)[:R] for _ in range(K)] for _ in range(L)] for _ in range(B)], axis=-1)
    positions = probe_positions(jnp.zeros((B,), jnp.int32), jnp.asarray(LENGTHS), settings, NUM_PROBES)
    is_exact, dense = settings.scoring == "exact", settings.num_dense
    labels = tuple(
        None
        if is_exact or layer < dense
        else make_labels(jnp.asarray(keys[layer]), jnp.asarray(channels[:, layer]), settings.label_bits)
        for layer in range(L)
    )
    probes, cached = (tuple(map(jnp.asarray, of_layers)) for of_layers in (queries, keys))
    prompt = prompt_of(probes, cached, labels, jnp.asarray(channels), positions)
    found = measure(prompt, config=CONFIG, settings=settings)
    J, exact_keys = settings.num_lists(CONFIG), keys.astype(np.float64)
    budget = oracle.Budget(
        2, 4, 3, J, R, num_probes=NUM_PROBES, interval=settings.refresh_interval, is_dilated=settings.dilate
    )

    def scores_of(layer, b, i):
        q, k = queries[layer, b, i].astype(np.float64), exact_keys[layer, b]
        return (
            oracle.key_scores(q, k) if is_exact else oracle.label_scores(q, k, channels[b, layer], settings.label_bits)
        )

    for b, length in enumerate(LENGTHS.tolist()):
        at = list(enumerate(oracle.probe_positions(0, length, budget)))
        lists = [
            [
                [[]] * J
                if layer < dense
                else oracle.critical_tokens(scores_of(layer, b, i), p + 1, budget, WINDOWS[layer])
                for layer in range(L)
            ]
            for i, p in at
        ]
        if measure is overlap_of:
            layers, of_lists = oracle.overlaps(lists, 4) if at else (np.zeros((L, L)), np.zeros((L, J, J)))
            np.testing.assert_allclose(found[0][b], layers, atol=EXACT, rtol=0)
            np.testing.assert_allclose(found[1][b], of_lists, atol=EXACT, rtol=0)
            assert (of_lists[:dense] == 0).all()
            if at:
                assert (np.diagonal(of_lists[dense:], axis1=1, axis2=2)[-1] == 1).all()  # a full list overlaps itself
            continue
        masses = [
            [
                mass
                for layer in range(L)
                for mass in (
                    [None] * J
                    if layer < dense
                    else oracle.list_masses(
                        oracle.key_scores(queries[layer, b, i].astype(np.float64), exact_keys[layer, b]),
                        oracle.dense_reads(p + 1, WINDOWS[layer]), J,
                    )
                )
            ]
            for i, p in at
        ]  # fmt: skip
        flat = [[tokens for of_layer in probe for tokens in of_layer] for probe in lists]
        caught = oracle.caught_masses(flat, masses) if at else np.zeros((L * J, L * J))
        np.testing.assert_allclose(found[b], caught, atol=MASS, rtol=0)
        assert (np.asarray(found[b])[: dense * J] == 0).all()  # a dense layer's lists neither copy nor serve
        assert (np.asarray(found[b])[:, : dense * J] == 0).all()


@pytest.mark.parametrize("num_heads", [3, 7])
def test_equal_overlaps_are_equal_to_the_last_bit(num_heads):
    # The greedy rule breaks ties by order, so equal overlaps must be equal to the last bit, whichever probes they come
    # from. Counts are therefore added up as whole numbers and divided last.
    rng = np.random.default_rng(2)
    P, H, S = 32, 4, 64
    settings = dataclasses.replace(PUBLISHED, num_sinks=0, num_critical=5, num_recent=1, label_bits=None)
    config = ModelConfig(16, 8, 8, 2, num_heads, num_heads, H, S, (None,) * 2)
    queries = rng.standard_normal((2, P, num_heads, H)).astype(np.float32)
    keys = (jnp.asarray(rng.standard_normal((1, num_heads, S, H)), jnp.float32),) * 2
    channels, positions = jnp.tile(jnp.arange(H), (1, 2, num_heads, 1)), jnp.full((1, P), S - 1)
    labels = tuple(make_labels(of_layer, channels[:, 0], None) for of_layer in keys)

    def overlap(order):
        probes = tuple(jnp.asarray(of_layer[None, order]) for of_layer in queries)
        prompt = prompt_of(probes, keys, labels, channels, positions)
        layers, _ = overlap_of(prompt, config=config, settings=settings)
        return float(layers[0, 1, 0])

    assert len({overlap(rng.permutation(P)) for _ in range(8)}) == 1


def test_a_list_catches_the_attention_of_other_heads_to_its_tokens():
    # Each layer has one head, 1 sink, 1 recent token and a list of 2 among slots 1 to 4. The attention to slots 0 to 5:
    # layer 0 .3 .2 .1 .15 .1 .15, so its list is 1 and 3; layer 1 .1 .3 .25 .1 .05 .2, so its list is 1 and 2.
    weights = np.array([[0.3, 0.2, 0.1, 0.15, 0.1, 0.15], [0.1, 0.3, 0.25, 0.1, 0.05, 0.2]])
    config = ModelConfig(16, 8, 8, 2, 1, 1, 2, 256, (None,) * 2)
    settings = HShareSettings(num_sinks=1, num_critical=2, num_recent=1, dense_layers=0, scoring="exact")
    keys = np.zeros((2, 1, 1, 6, 2), np.float32)
    keys[:, 0, 0, :, 0] = np.log(weights) * 2**0.5
    queries = jnp.zeros((1, 1, 1, 2)).at[..., 0].set(1.0)
    channels, positions = jnp.zeros((1, 2, 1, 1), jnp.int32), jnp.asarray([[5]])
    prompt = prompt_of((queries,) * 2, tuple(map(jnp.asarray, keys)), (None,) * 2, channels, positions)
    mass = measure_mass(prompt, config=config, settings=settings)
    np.testing.assert_allclose(mass[0], [[0.35, 0.3], [0.4, 0.55]], atol=MASS, rtol=0)
    of_layers, _ = measure_overlap(prompt, config=config, settings=settings)
    np.testing.assert_allclose(of_layers[0], [[1, 0.5], [0.5, 1]], atol=EXACT, rtol=0)
