"""One prefill serves every method: each starts from it as from its own prefill, and no cache is copied."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import HSHARE, MODEL, PUBLISHED, params, prefill_rows, random_rows, vary

from hshare_jax.evaluation.prefilled import prefill_for
from hshare_jax.evaluation.teacher_forcing import score_steps
from hshare_jax.methods import H2O, Quest, SnapKV, StreamingLLM
from hshare_jax.methods.hshare.share_plan import SharePlan
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.models.pretrained import Model
from hshare_jax.prompts import pad_prompts

F32 = 1e-4  # between two float32 programs, on losses of about 4
TINY = Model(MODEL, params(), None, (), "tiny", "")
PLAN = SharePlan(((0, 1, 2), (3, 4, 3), (4, 3, 3), (3, 4, 4)))
ALL = {
    "dense": None,
    "hshare": HSHARE,
    "hshare, plan given": dataclasses.replace(HSHARE, plan=PLAN),
    "published": PUBLISHED,
    "h2o": H2O(num_heavy=5, num_recent=4),
    "quest": Quest(num_pages=2, page_size=4),
    "snapkv": SnapKV(num_critical=6, num_observed=4),
    "streaming_llm": StreamingLLM(2, num_recent=6),
}


def assert_equal_states(state, expected):
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(found, np.float64), np.asarray(wanted, np.float64), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_a_method_starts_from_the_shared_prefill_as_from_its_own(name):
    rows = random_rows(21)
    tokens, lengths = (jnp.asarray(array) for array in pad_prompts([list(map(int, row)) for row in rows]))
    held = prefill_for(TINY, tokens, lengths, 100, list(ALL.values()))
    _, expected = prefill_rows(rows, method=ALL[name])
    assert_equal_states(held.start(ALL[name]), expected)


def test_a_variant_that_shares_more_lists_starts_with_a_plan_and_tails_of_its_own():
    rows, variants = random_rows(21), [HSHARE, vary(HSHARE, layer_ratio=Fraction(1, 3)), HSHARE]
    tokens, lengths = (jnp.asarray(array) for array in pad_prompts([list(map(int, row)) for row in rows]))
    held, sources = prefill_for(TINY, tokens, lengths, 100, variants), []
    for variant in variants:  # the second and the third use what the first has measured
        _, expected = prefill_rows(rows, method=variant)
        state = held.start(variant)
        assert_equal_states(state, expected)
        assert isinstance(state.method_state, SharedLists)
        sources.append(np.asarray(state.method_state.source))
        held.take_back(state)
        assert len(held.memo) == 1
    assert (sources[0] != sources[1]).any()


def test_every_method_decodes_on_the_one_cache_of_the_prefill():
    rows, texts = random_rows(21), jnp.asarray(np.stack(random_rows(26, lengths=(9,) * 4)))
    tokens, lengths = (jnp.asarray(array) for array in pad_prompts([list(map(int, row)) for row in rows]))
    held = prefill_for(TINY, tokens, lengths, 100, list(ALL.values()))
    assert held.cache is not None
    buffers = [keys.unsafe_buffer_pointer() for keys in held.cache.keys]
    for name in [*ALL, *ALL]:  # each overwrites what the method before wrote behind the prompts
        expected, _ = score_steps(params(), texts, prefill_rows(rows, method=ALL[name])[1], config=MODEL)
        state = held.start(ALL[name])
        with pytest.raises(ValueError, match="has the prompts' cache: give it to take_back first"):
            held.start(None)
        given = state
        found, state = score_steps(params(), texts, given, config=MODEL)
        with pytest.raises(ValueError, match="donates it: give the state that they returned"):
            held.take_back(given)
        held.take_back(state)
        np.testing.assert_allclose(found.loss, expected.loss, atol=F32)
        np.testing.assert_array_equal(found.reads, expected.reads)
        assert [keys.unsafe_buffer_pointer() for keys in held.cache.keys] == buffers, "a cache was copied"


def test_a_method_that_the_prefill_was_not_made_for_is_refused():
    tokens, lengths = jnp.asarray(random_rows(22, lengths=(60,))[0][None]), jnp.asarray([60], jnp.int32)
    held = prefill_for(TINY, tokens, lengths, 100, [None, StreamingLLM(2, num_recent=6)])
    with pytest.raises(ValueError, match=r"the prefill was not made for HShare\(.*name it among its methods"):
        held.start(HSHARE)
