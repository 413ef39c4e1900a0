"""Methods by name: each method reads as many tokens as HShare with the same budget."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import HSHARE, MODEL, params, prefill_rows, random_rows, vary

from hshare_jax.decode_step import decode_step
from hshare_jax.methods.names import METHODS, takes_setting
from hshare_jax.methods.registry import method_named


@pytest.mark.parametrize("name", METHODS)
def test_methods_by_name_read_no_more_than_the_budget(name):
    hshare = vary(HSHARE, num_sinks=4, num_critical=32, num_recent=12, refresh_interval=1)
    method = method_named(name, hshare, max_new_tokens=4)
    (row,) = random_rows(26, lengths=(200,), more=1)
    _, state = prefill_rows([row[:200]], method=method)
    _, state = decode_step(params(), jnp.asarray(row[200:201]), state, config=MODEL)
    if state.method_state is None:
        assert (name, method) == ("dense", None)
        return
    for layer in range(MODEL.num_layers):
        reads = np.asarray(state.method_state.mark_reads(layer, state.cache, MODEL))[0].sum(axis=-1)
        most = 201 if layer < hshare.settings.num_dense else hshare.settings.budget + (name == "snapkv")
        assert (reads <= most).all()
        assert (reads >= most - 16).all()


@pytest.mark.parametrize("name", ["exact_topk", "double_sparsity"])
def test_methods_by_name_follow_no_setting_that_they_do_not_take(name):
    others = {"pool": 2, "tail": "fitted", "tail_rank": 1, "lists_per": "kv_head", "scoring": "labels"}
    assert not any(takes_setting(name, setting) for setting in others)
    assert method_named(name, vary(HSHARE, **others)) == method_named(name, vary(HSHARE, tail_rank=1))


def test_unknown_names_and_budgets_too_small_are_refused():
    with pytest.raises(ValueError, match="method='magic' must be one of 'hshare', 'dense'"):
        method_named("magic", HSHARE)
    with pytest.raises(ValueError, match="a budget of 12 tokens is too small for quest; it needs at least 16"):
        method_named("quest", HSHARE)
