"""The reference selection skips layers that choose nothing, and is traced once for all layers of a step.

The lists that it chooses are held against the oracle in test_implementations.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hshare_jax.kernels.choose_tokens
from hshare_jax.kernels import reference_selection

L, B, N, K, S, H, C = 3, 2, 4, 2, 32, 8, 5
rng = np.random.default_rng(1)
q, keys = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((B, N, H), (B, K, S, H)))
source = jnp.tile(jnp.arange(L * K).reshape(1, L, K), (B, 1, 1))
lists = jnp.zeros((L, B, K, C), jnp.int32)
first, last = jnp.asarray([2, 2]), jnp.asarray([9, S])


def choose(lists, layer, source, is_due):
    return reference_selection.select_by_keys(lists, layer, q, keys, source, is_due, first, last, None)


def test_only_the_layer_that_is_asked_for_changes():
    chosen = choose(lists, 1, source, jnp.asarray([True, True]))
    assert (np.asarray(chosen[1]) > 0).all()
    np.testing.assert_array_equal(chosen[::2], lists[::2])


@pytest.mark.parametrize(
    ("plan", "is_due", "num_scored"),
    [(source, [True, False], 1), (source, [False, False], 0), (jnp.zeros_like(source), [True, True], 0)],
    ids=["one row is due", "no row is due", "all lists are copies"],
)
def test_a_layer_that_chooses_nothing_computes_no_score(plan, is_due, num_scored, monkeypatch):
    runs, score_keys = [], reference_selection.score_keys

    def counted(*arrays):
        jax.debug.callback(lambda: runs.append(True))
        return score_keys(*arrays)

    monkeypatch.setattr(reference_selection, "score_keys", counted)
    jax.block_until_ready(choose(lists, 1, plan, jnp.asarray(is_due)))
    jax.effects_barrier()
    assert len(runs) == num_scored


def test_the_choice_is_traced_once_for_all_layers(monkeypatch):
    traces = []
    select = hshare_jax.kernels.choose_tokens.select_tokens
    monkeypatch.setattr(
        hshare_jax.kernels.choose_tokens, "select_tokens", lambda *args: traces.append(args) or select(*args)
    )

    @jax.jit
    def step(lists):
        layers = [functools.partial(choose, layer=layer) for layer in range(L)]
        return functools.reduce(lambda lists, choose: choose(lists, source=source, is_due=first > 0), layers, lists)

    step(jnp.ones((L, B, K, C + 1), jnp.int32))  # lists of a size that no other test here chooses
    assert len(traces) == 1
