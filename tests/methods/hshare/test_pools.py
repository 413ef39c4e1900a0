"""Pools: a list that copies chooses what it would choose by itself, as far as its source's pool holds it."""

import dataclasses
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from tiny_decoder import CAPACITY, MODEL, TAILED, params, prefill_rows, random_rows, vary

from hshare_jax.decode_step import decode_step
from hshare_jax.kernels.labels import make_labels
from hshare_jax.methods.hshare.pools import choose_in_pools
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.shapes import EMPTY

EVERY_STEP = vary(TAILED, refresh_interval=1)
WINDOWED = dataclasses.replace(MODEL, windows=(None, 20, 9, None))


def lists_after(method, config=MODEL, steps=3, impl="auto"):
    """What every list chose after some steps, and the logits of the last step."""
    rows = random_rows(5, more=steps)
    logits, state = prefill_rows([row[:-steps] for row in rows], method=method, config=config)
    for step in range(steps):
        tokens = jnp.asarray([row[step - steps] for row in rows])
        logits, state = decode_step(params(config), tokens, state, config=config, impl=impl)
    assert isinstance(state.method_state, SharedLists)
    return np.asarray(state.method_state.token_indices), np.asarray(logits)


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({"tail": None}, MODEL),
        ({}, MODEL),
        ({"tail": None, "scoring": "exact", "lists_per": "query_head", "dense_layers": 0}, WINDOWED),
        ({"tail": None, "label_bits": None, "lists_per": "query_head"}, MODEL),
    ],
    ids=["labels", "labels, with a tail", "exact, per query head, windows", "not quantised, per query head"],
)
def test_copies_in_a_pool_of_everything_choose_as_if_they_were_computed(changes, config):
    method = vary(EVERY_STEP, **changes)
    most = -(-CAPACITY // method.settings.num_critical)
    pooled, logits = lists_after(vary(method, pool=most), config)
    alone, expected = lists_after(method.with_sharing_ratio("1-1-1"), config)
    dense = method.settings.num_dense
    np.testing.assert_array_equal(pooled[dense:], alone[dense:])
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


def test_a_pool_is_what_its_source_chose_and_lists_are_the_best_of_it():
    method = vary(EVERY_STEP, pool=2, dilate=False, tail=None)
    rows = random_rows(6, more=1)
    _, state = prefill_rows([row[:-1] for row in rows], method=method)
    _, state = decode_step(params(MODEL), jnp.asarray([row[-1] for row in rows]), state, config=MODEL)
    lists = state.method_state
    assert isinstance(lists, SharedLists)
    source, pools, chosen = (np.asarray(array) for array in (lists.source, lists.pools, lists.token_indices))
    _, B, J, _ = chosen.shape
    copies = 0
    for layer, b, j in np.ndindex(MODEL.num_layers, B, J):
        if layer < method.settings.num_dense:
            continue
        unit = source[b, layer, j]
        pool = set(pools[unit // J, b, unit % J].tolist()) - {EMPTY}
        kept = set(chosen[layer, b, j].tolist()) - {EMPTY}
        assert kept <= pool
        assert len(kept) == min(len(pool), method.settings.num_critical)
        copies += unit != layer * J + j
    assert copies > 0


@pytest.mark.parametrize(("J", "window", "bits"), [(2, None, 4), (4, 9, 8), (4, None, None), (2, 9, "exact")])
def test_the_best_of_a_pool_equal_the_oracle(J, window, bits):
    rng, (B, N, K, S, H, W, C) = np.random.default_rng(3), (3, 4, 2, 32, 8, 12, 5)
    q, keys = rng.standard_normal((B, N, H)).astype(np.float32), rng.standard_normal((B, K, S, H)).astype(np.float32)
    channels = np.sort(np.argsort(rng.random((B, K, H)), axis=-1)[..., :3], axis=-1).astype(np.int32)
    lengths, pools = np.array([32, 20, 3]), np.full((B, J, W), EMPTY, np.int32)
    for b, j in np.ndindex(B, J):
        held = np.sort(rng.permutation(lengths[b])[: rng.integers(1, W + 1)])
        pools[b, j, : len(held)] = held
    settings = HShareSettings(
        num_critical=C, label_bits=None if bits == "exact" else bits, label_channels=3,
        scoring="exact" if bits == "exact" else "labels", lists_per="kv_head" if J == K else "query_head",
    )  # fmt: skip
    labels = None if bits == "exact" else make_labels(jnp.asarray(keys), jnp.asarray(channels), bits)
    found = choose_in_pools(
        jnp.asarray(q), jnp.asarray(pools), jnp.asarray(keys), labels, jnp.asarray(channels), jnp.asarray(lengths),
        settings=settings, window=window,
    )  # fmt: skip
    for b, j in np.ndindex(B, J):
        exact = q[b].astype(np.float64), keys[b].astype(np.float64)
        scores = oracle.key_scores(*exact) if labels is None else oracle.label_scores(*exact, channels[b], bits)
        group = slice(j * N // J, (j + 1) * N // J)
        candidates = set(pools[b, j].tolist()) & oracle.dense_reads(int(lengths[b]), window)
        weights = oracle.pooled(scores[group], candidates, 1)[0]
        expected = oracle.select(weights, candidates, C)
        assert found[b, j].tolist() == expected + [EMPTY] * (C - len(expected))


def test_a_budget_ratio_bounds_what_lists_take_from_a_pool():
    method = vary(EVERY_STEP, pool=2, budget_ratio=Fraction(1, 6), tail=None)
    chosen, _ = lists_after(method)
    alone, _ = lists_after(vary(method, pool=1))
    counts = (chosen[1:, 3] != EMPTY).sum(axis=-1)
    assert counts.max() == (alone[1:, 3] != EMPTY).sum(axis=-1).max() > 0


def test_pools_without_lists_that_copy_change_nothing():
    # A list of several heads weighs them by their softmax over the pool, so only lists of one head are quite the same.
    method = vary(EVERY_STEP.with_sharing_ratio("1-1-1"), tail=None, lists_per="query_head")
    pooled, logits = lists_after(vary(method, pool=3))
    alone, expected = lists_after(method)
    np.testing.assert_array_equal(pooled[1:], alone[1:])
    np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=0)
