"""Refits: what was found from a prompt is found anew from a row's last tokens, as often as the method asks."""

import dataclasses
import importlib
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoding import SAME, decode, lists_of, shared_of, start
from tiny_decoder import CAPACITY, HSHARE, LENGTHS, MODEL, TAILED, oracle_rows, params, prefill_rows, random_rows, vary

from hshare_jax.decode_state import count_reads, init_state
from hshare_jax.decode_step import decode_step
from hshare_jax.errors import SettingError
from hshare_jax.evaluation.recall import measure_recall, recall_of, without_recall
from hshare_jax.evaluation.teacher_forcing import score_steps, score_text
from hshare_jax.generate import generate
from hshare_jax.kernels import native_library
from hshare_jax.kernels.masked_softmax import MASKED
from hshare_jax.kernels.tail import HIGH
from hshare_jax.methods import exact_topk
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.hshare.settings import PlanSearch
from hshare_jax.methods.names import REFIT_TOKENS
from hshare_jax.models.pretrained import Model
from hshare_jax.prefill import prefill, refit
from hshare_jax.prompts import pad_prompts

F32 = 1e-4  # absolute, against float64
OFTEN = vary(TAILED, refit_interval=64)
SHALLOW = dataclasses.replace(MODEL, num_layers=2, windows=(None,) * 2)
MODEL_OF_IDS = Model(SHALLOW, params(SHALLOW), None, (), "tiny", "0" * 16)


def terms_of(state):
    tail = shared_of(state).tails[-1]
    assert tail is not None
    return np.asarray(tail.terms)


def test_a_refit_equals_the_oracle():
    # The rows read their last 3, 9, 5 and 8 tokens once more; these may begin in the prompt.
    before, after, again = 7, 4, (3, 9, 5, 8)
    rows = random_rows(31, more=before + after)
    shared_rows = oracle_rows([row[:n] for row, n in zip(rows, LENGTHS, strict=True)], TAILED)
    _, state = decode(rows, start(rows, method=TAILED), before)
    last = [row[n + before - m : n + before].tolist() for row, n, m in zip(rows, LENGTHS, again, strict=True)]
    for b, shared_row in enumerate(shared_rows):
        for token in rows[b][LENGTHS[b] : LENGTHS[b] + before]:
            shared_row.decode(token)
        shared_row.refit(last[b])
    was = terms_of(state)
    tokens, sizes = map(jnp.asarray, pad_prompts(last))
    state = refit(params(), tokens, sizes, state, config=MODEL, method=TAILED)
    assert state.cache.lengths.tolist() == [n + before for n in LENGTHS]
    assert (terms_of(state)[3] != was[3]).any()
    for step in range(before, before + after):
        found, state = decode_step(
            params(), jnp.asarray([row[n + step] for row, n in zip(rows, LENGTHS, strict=True)]), state, config=MODEL
        )
        expected = [row.decode(rows[b][LENGTHS[b] + step]) for b, row in enumerate(shared_rows)]
        np.testing.assert_allclose(found, np.stack(expected), atol=F32, rtol=0)
    lists = lists_of(state)
    assert [[lists[layer][b] for layer in range(MODEL.num_layers)] for b in range(len(rows))] == [
        row.lists for row in shared_rows
    ]


def test_generation_refits_as_often_as_the_method_asks(monkeypatch):
    module, new, prompts = importlib.import_module("hshare_jax.generate"), 140, random_rows(32, (5, 60))
    calls = []
    monkeypatch.setattr(module, "refit", lambda *a, **k: calls.append(a[1].shape) or refit(*a, **k))
    found = generate(MODEL_OF_IDS, [row.tolist() for row in prompts], method=OFTEN, max_new_tokens=new)
    assert calls == [(2, REFIT_TOKENS)] * 2
    for b, prompt in enumerate(prompts):
        logits, state = prefill_rows([prompt], method=OFTEN, config=SHALLOW)
        text, reads = [*prompt.tolist(), int(logits[0].argmax())], []
        for step in range(new - 1):
            if step in (66, 132):
                last = jnp.asarray([text[:-1][-REFIT_TOKENS:]], jnp.int32)
                state = refit(params(SHALLOW), last, jnp.asarray([last.size]), state, config=SHALLOW, method=OFTEN)
                reads.append(len(text) - 1)
            logits, state = decode_step(params(SHALLOW), jnp.asarray(text[-1:], jnp.int32), state, config=SHALLOW)
            text.append(int(logits[0].argmax()))
            reads.append(float(count_reads(state, SHALLOW)[0]))
        assert found.tokens[b] == text[len(prompt) :]
        assert found.usage.reads[b] == pytest.approx(sum(reads) / (new - 1))


def test_lists_are_counted_by_the_plan_that_chose_them():
    # The prompt is too short for a plan: every list chooses, until a refit finds a plan in which half of them do.
    half = vary(OFTEN, refresh_interval=1, layer_ratio=Fraction(1, 2), head_ratio=Fraction(1), dense_layers=0)
    prompt, new = random_rows(34, (5,))[0].tolist(), REFIT_TOKENS + 11
    usage = generate(MODEL_OF_IDS, [prompt], method=half, max_new_tokens=new).usage
    lists = SHALLOW.num_layers * SHALLOW.num_kv_heads
    assert usage.refreshes == new - 1
    assert usage.possible_selections == (new - 1) * lists
    assert usage.selections == REFIT_TOKENS * lists + 10 * lists // 2


def test_rows_that_read_everything_choose_nothing_until_they_turn_sparse():
    gated = vary(OFTEN, refresh_interval=4, min_length=20, layer_ratio=Fraction(1), head_ratio=Fraction(1))
    prompt, new = random_rows(35, (5,))[0].tolist(), 33
    found = generate(MODEL_OF_IDS, [prompt], method=gated, max_new_tokens=new)
    # Steps 0, 4, 8, ... are due, at 6, 10, 14, ... tokens. The lists of the step at 18 tokens serve up to 21.
    assert found.usage.refreshes == 5
    whole = generate(MODEL_OF_IDS, [prompt], method=vary(gated, min_length=64), max_new_tokens=new)
    assert whole.usage.refreshes == whole.usage.selections == 0
    assert whole.tokens == generate(MODEL_OF_IDS, [prompt], method=None, max_new_tokens=new).tokens


def test_scores_of_a_long_text_are_those_of_its_pieces():
    steps, rows = 100, random_rows(33, (5, 60), more=101)
    text = jnp.asarray([row[-steps - 1 :] for row in rows])
    state = start(rows, (5, 60), method=OFTEN, config=SHALLOW)
    first, state = score_steps(params(SHALLOW), text[:, :67], state, config=SHALLOW)
    state = refit(params(SHALLOW), text[:, 2:66], jnp.full(2, 64), state, config=SHALLOW, method=OFTEN)
    second, state = score_steps(
        params(SHALLOW), text[:, 66:], measure_recall(state, 7), config=SHALLOW, observe=recall_of
    )
    found, end = score_text(
        params(SHALLOW),
        text,
        start(rows, (5, 60), method=OFTEN, config=SHALLOW),
        config=SHALLOW,
        method=OFTEN,
        recall_every=7,
    )
    np.testing.assert_allclose(found.loss, np.concatenate([first.loss, second.loss]), atol=SAME, rtol=0)
    assert second.observed is not None
    assert found.observed is not None
    is_measured = np.concatenate([np.arange(66) % 7 == 0, np.arange(34) % 7 == 0])
    np.testing.assert_array_equal(np.isfinite(found.observed).all(axis=1), is_measured)
    np.testing.assert_allclose(found.observed[66::7], second.observed[::7], atol=SAME, rtol=0)
    np.testing.assert_array_equal(shared_of(end).token_indices, shared_of(without_recall(state)).token_indices)


def test_rows_that_outgrew_the_cache_do_not_keep_others_from_a_refit():
    lengths = (5, CAPACITY - 20)
    rows = random_rows(34, lengths, more=80)
    text = jnp.asarray([row[-80:] for row in rows])
    wide, tight = (
        score_text(
            params(SHALLOW),
            text,
            start(rows, lengths, method=OFTEN, config=SHALLOW, capacity=capacity),
            config=SHALLOW,
            method=OFTEN,
        )[0].loss
        for capacity in (2 * CAPACITY, CAPACITY)
    )
    np.testing.assert_array_equal(np.isnan(tight[:, 1]), np.arange(79) >= 20)
    np.testing.assert_allclose(tight[:, 0], wide[:, 0], atol=SAME, rtol=0)


def test_methods_that_find_nothing_from_a_prompt_ask_for_no_refit():
    assert HShare().refit_interval == 512
    assert HSHARE.refit_interval == 513  # for its plan; a choice serves three steps
    assert exact_topk().refit_interval is None
    assert HShare.paper().refit_interval is None
    assert OFTEN.with_settings({"refit_interval": None}).refit_interval is None
    with pytest.raises(SettingError, match="refit_interval=63 must be at least 64"):
        PlanSearch(refit_interval=63)


@pytest.mark.skipif(native_library.obstacle() is not None, reason=f"the native library {native_library.obstacle()}")
def test_with_the_reference_no_native_kernel_reads_a_prompt(monkeypatch):
    def refuse(name, *_, **how):
        raise AssertionError(name)

    monkeypatch.setattr(jax.ffi, "ffi_call", refuse)
    method = vary(TAILED, num_critical=5)  # of which nothing is compiled yet
    tokens, sizes = jnp.ones((1, 48), jnp.int32), jnp.asarray([48])
    how = {"config": SHALLOW, "method": method}
    state = init_state(SHALLOW, 1, 64, method=method)
    _, state = prefill(params(SHALLOW), tokens, sizes, state, **how, impl="reference")
    state = refit(params(SHALLOW), tokens, sizes, state, **how, impl="reference")
    assert (terms_of(state)[..., HIGH] > MASKED).any()
    with pytest.raises(AssertionError, match="hshare_"):
        refit(params(SHALLOW), tokens, sizes, state, **how)
