"""Evaluation loops: one prefill serves every method exactly, scores equal their definitions, passkeys are asked."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import selector_oracle
from random_weights import random_params
from tiny_decoder import HSHARE, LENGTHS, MODEL, PUBLISHED, oracle_row, params, prefill_rows, random_rows
from tiny_tokenizer import LETTERS, byte_tokenizer

import hshare_jax.evaluation.tasks.passkey as passkey_module
import hshare_jax.evaluation.teacher_forcing
from hshare_jax.decode_state import start_method
from hshare_jax.evaluation.bootstrap import interval, mean_ratio
from hshare_jax.evaluation.prefilled import prefill_for
from hshare_jax.evaluation.recall import measure_recall, recall_of
from hshare_jax.evaluation.run import KEYS, run_texts
from hshare_jax.evaluation.tasks.passkey import ANSWER_TOKENS, ask, is_found, make_passkeys
from hshare_jax.evaluation.teacher_forcing import score_steps
from hshare_jax.evaluation.text_windows import Scorer, cut_windows
from hshare_jax.files.records import Records
from hshare_jax.generate import generate
from hshare_jax.methods import H2O, Quest, SnapKV, StreamingLLM
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.methods.registry import METHODS, method_named
from hshare_jax.models.pretrained import Model
from hshare_jax.prompts import pad_prompts

SAME = 1e-5  # between two float32 programs of the same model
F32 = 1e-4  # against float64
TINY = Model(
    dataclasses.replace(MODEL, max_positions=512), random_params(MODEL), byte_tokenizer(LETTERS), (), "tiny", ""
)
ALL = {
    "dense": None,
    "hshare": HSHARE,
    "published": PUBLISHED,
    "h2o": H2O(num_heavy=5, num_recent=4),
    "quest": Quest(num_pages=2, page_size=4),
    "snapkv": SnapKV(num_critical=6, num_observed=4),
    "streaming_llm": StreamingLLM(2, num_recent=6),
}


def prompts(rows):
    return [row[:n] for row, n in zip(rows, LENGTHS, strict=True)]


@pytest.mark.parametrize("name", ALL)
def test_what_starts_from_the_shared_prefill_is_what_its_own_prefill_gives(name):
    rows = random_rows(21)
    tokens, lengths = (jnp.asarray(array) for array in pad_prompts([list(map(int, row)) for row in rows]))
    held = prefill_for(dataclasses.replace(TINY, params=params()), tokens, lengths, 100, list(ALL.values()))
    _, expected = prefill_rows(rows, hshare=ALL[name])
    state = held.start(ALL[name])
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(found, np.float64), np.asarray(wanted, np.float64), atol=1e-4, rtol=1e-4)


def test_every_method_decodes_on_the_one_cache_of_the_prefill():
    rows, texts = random_rows(21), jnp.asarray(np.stack(random_rows(26, lengths=(9,) * 4)))
    tokens, lengths = (jnp.asarray(array) for array in pad_prompts([list(map(int, row)) for row in rows]))
    held = prefill_for(dataclasses.replace(TINY, params=params()), tokens, lengths, 100, list(ALL.values()))
    assert held.cache is not None
    buffers = [keys.unsafe_buffer_pointer() for keys in held.cache.keys]
    for name in [*ALL, *ALL]:  # each after what another left behind the prompts
        expected, _ = score_steps(params(), texts, prefill_rows(rows, hshare=ALL[name])[1], config=MODEL)
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
    with pytest.raises(ValueError, match=r"the prefill was not made for HShareSettings\(.*name it among its methods"):
        held.start(HSHARE)


@pytest.mark.parametrize("name", ["hshare", "h2o", "streaming_llm"])
def test_recall_is_the_mass_of_exact_attention_on_what_is_read(name):
    rows = random_rows(23, lengths=(60,), more=3)
    _, state = prefill_rows([rows[0][:60]], hshare=ALL[name])
    state = measure_recall(state)
    exact = oracle_row()
    for token in rows[0][:60]:
        exact.dense_step(token)
    for step in range(3):
        _, state = hshare_jax.decode_step(params(), jnp.asarray(rows[0][60 + step :][:1]), state, config=MODEL)
        marks = [state.method_state.mark_reads(layer, state.cache, MODEL)[0] for layer in range(MODEL.num_layers)]
        reads = [[set(np.flatnonzero(m[n * len(m) // 6])) for n in range(6)] for m in np.asarray(marks, object)]
        exact.step(rows[0][60 + step], lambda layer, length, reads=reads: reads[layer])
        caught = [
            selector_oracle.weights(exact, layer, 60 + step)[n, sorted(reads[layer][n])].sum()
            for layer in range(MODEL.num_layers)
            for n in range(6)
        ]
        np.testing.assert_allclose(recall_of(state, MODEL), [np.mean(caught)], atol=F32)


def test_recall_is_taken_on_the_first_of_every_so_many_steps_and_changes_nothing():
    rows = random_rows(24, lengths=(60,), more=6)
    tokens = jnp.asarray(rows[0][None, 60:])
    plain, measured = (prefill_rows([rows[0][:60]], hshare=HSHARE)[1] for _ in range(2))
    expected, _ = score_steps(params(), tokens, plain, config=MODEL)
    found, _ = score_steps(params(), tokens, measure_recall(measured, every=3), config=MODEL, observe=recall_of)
    np.testing.assert_allclose(found.loss, expected.loss, atol=SAME)
    np.testing.assert_array_equal(np.asarray(found.observed)[:, 0] > 0, [True, False, False, True, False])


TEXT = "the rain in spain stays mainly in the plain, or so it is said. " * 30


def test_windows_are_spread_over_the_text_and_scored_as_decode_steps():
    windows = cut_windows(TINY, "rain.txt", TEXT, context=100, count=3, skip=0.1)
    ids = byte_tokenizer(LETTERS)(TEXT)["input_ids"]
    starts = [int(window.id.split(":")[1]) for window in windows]
    assert starts[0] == int(len(ids) * 0.1)
    assert starts[1] - starts[0] == pytest.approx((len(ids) - starts[0] - 101) / 3, abs=1)
    assert starts[2] - starts[1] == pytest.approx((len(ids) - starts[0] - 101) / 3, abs=1)
    assert all(list(window.tokens) == ids[start : start + 101] for window, start in zip(windows, starts, strict=True))
    scorer = Scorer(TINY, windows, 8, [None, HSHARE])
    dense, sparse = scorer.score(None), scorer.score(HSHARE)
    np.testing.assert_allclose(dense["divergence"], 0, atol=1e-6)
    assert dense["agrees"].all()
    assert (dense["recall"][:, 0] == 1).all()
    # By hand: each position's loss from a prefill of all tokens before it.
    for b, window in enumerate(windows):
        for step in range(8):
            logits, _ = prefill_rows([np.asarray(window.tokens[: 93 + step])], hshare=None)
            log_p = np.asarray(jax.nn.log_softmax(logits[0]))
            np.testing.assert_allclose(dense["loss"][b, step], -log_p[window.tokens[93 + step]], atol=F32)
    assert (sparse["reads"] < 40).all()
    assert (sparse["divergence"] > 0).any()
    np.testing.assert_array_equal(np.isnan(sparse["recall"][0]), [False] + [True] * 7)
    without = scorer.score(HSHARE, recall_every=None)
    assert np.isnan(without["recall"]).all()
    np.testing.assert_allclose(without["loss"], sparse["loss"], atol=SAME)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    windows = cut_windows(TINY, "rain.txt", TEXT, context=40, count=1)
    broken = dataclasses.replace(TINY, params=jax.tree.map(lambda weight: weight * np.nan, TINY.params))
    records = Records(tmp_path / "out.jsonl", {}, keys=KEYS)
    with pytest.raises(ValueError, match=r"rain.txt:0: the loss of dense is nan in float32: the weights are"):
        run_texts(broken, windows, {"dense": None}, records, steps=4, batch_size=1)
    assert not records.path.exists()


def read_of(windows, length):
    return jnp.asarray([window.tokens[:length] for window in windows], jnp.int32), jnp.full((len(windows),), length)


def test_one_dispatch_scores_a_chunk_and_one_program_all_ratios(monkeypatch):
    windows = cut_windows(TINY, "rain.txt", TEXT, context=100, count=2)
    calls = []
    scored: Any = hshare_jax.evaluation.teacher_forcing._score_steps
    monkeypatch.setattr(
        hshare_jax.evaluation.teacher_forcing, "_score_steps", lambda *a, **k: calls.append(0) or scored(*a, **k)
    )
    before = scored._cache_size()
    ratios = [HSHARE, HSHARE.with_sharing_ratio("1/3-1-1/3")]
    scorer = Scorer(TINY, windows, 8, ratios)
    plans = []
    for hshare in ratios:
        state = scorer.prefilled.start(hshare)
        assert isinstance(state.method_state, SharedLists)
        plans.append(np.asarray(state.method_state.source))
        own = prefill_for(TINY, *read_of(windows, 92), 100, [hshare]).start(hshare).selection
        assert isinstance(own, SharedLists)
        np.testing.assert_array_equal(plans[-1], own.source)
        scorer.score_state(state)
    assert (plans[0] != plans[1]).any()
    assert len(scorer.prefilled.measured) == 1
    assert len(calls) == 2
    assert scored._cache_size() == before + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 1}, "context=1 must lie between 2 and the model's 512"),
        ({"context": 513}, "context=513 must lie between"),
        ({"context": 300, "text": "short"}, "rain.txt has .* tokens to cut from; a window needs context=300 and one"),
    ],
)
def test_windows_that_cannot_be_cut_are_refused(changes, message):
    given = {"text": TEXT, "context": 100, "count": 1, **changes}
    with pytest.raises(ValueError, match=message):
        cut_windows(TINY, "rain.txt", given.pop("text"), **given)


def test_windows_all_differ_or_are_refused():
    text = TEXT[:100]
    size = len(byte_tokenizer()(text)["input_ids"])  # the tests' own tokeniser writes no <s>
    most = cut_windows(TINY, "rain.txt", text, context=size - 4, count=3)
    assert len({window.tokens for window in most}) == len({window.id for window in most}) == 3
    with pytest.raises(ValueError, match=r"count=4 must be at most 3: rain.txt has no more windows that differ"):
        cut_windows(TINY, "rain.txt", text, context=size - 4, count=4)
    assert len(cut_windows(TINY, "rain.txt", text, context=size - 1, count=1)) == 1


def test_recall_of_what_does_not_take_it_is_an_error():
    _, state = prefill_rows(prompts(random_rows(1)), hshare=HSHARE)
    with pytest.raises(ValueError, match=r"the state takes no recall along: give measure_recall\(state\) to the steps"):
        recall_of(state, MODEL)


def test_a_window_needs_a_prompt_before_its_scored_steps():
    with pytest.raises(ValueError, match="steps=100 must be less than the windows' 100 tokens"):
        Scorer(TINY, cut_windows(TINY, "rain.txt", TEXT, context=100, count=1), 100, [None])


def test_passkeys_hide_a_number_at_every_depth_and_a_seed_repeats_them():
    def encode(text):
        return byte_tokenizer()(text)["input_ids"]

    passkeys = make_passkeys(byte_tokenizer(), TEXT * 3, 400, range(20))
    assert passkeys == make_passkeys(byte_tokenizer(), TEXT * 3, 400, range(20))
    assert len({passkey.key for passkey in passkeys}) == 20
    for passkey in passkeys:
        assert len(passkey.text) + len(passkey.question) == 400
        text = str(byte_tokenizer().decode(list(passkey.text)))
        assert text.count(passkey.key) == 2
        room = 400 - len(passkey.question) - len(encode(passkey_module.NEEDLE.format(key=passkey.key)))
        found = len(encode(text[: text.index("\n\nThe pass key is")]))
        assert abs(found - passkey.depth * room) <= 2
    assert max(p.depth for p in passkeys) > 0.8
    assert min(p.depth for p in passkeys) < 0.2
    (deep,) = make_passkeys(byte_tokenizer(), TEXT * 3, 400, [0], depth=1.0)
    assert str(byte_tokenizer().decode(list(deep.text))).endswith("is the pass key.\n\n")


@pytest.mark.parametrize("context", [60, 100_000])
def test_a_passkey_that_does_not_fit_is_refused(context):
    with pytest.raises(ValueError, match=f"context={context} must lie between"):
        make_passkeys(byte_tokenizer(), TEXT, context, [0])


def test_an_answer_is_what_greedy_decoding_says_after_the_question():
    rows = [list(map(int, row)) for row in random_rows(25, lengths=(20, 20))]
    question = [3, 1, 4]
    tokens, lengths = (jnp.asarray(array) for array in pad_prompts(rows))
    state = prefill_for(TINY, tokens, lengths, 64, [None]).start(None)
    answers, _ = ask(TINY.params, question, state, config=TINY.config)
    expected = generate(TINY, [row + question for row in rows], max_new_tokens=ANSWER_TOKENS, method=None)
    assert answers.tolist() == expected.tokens


def test_an_answer_counts_where_it_begins_with_the_number():
    (passkey,) = make_passkeys(byte_tokenizer(), TEXT * 3, 400, [0])
    assert is_found(passkey, f" {passkey.key}. It")
    assert not is_found(passkey, f" not {passkey.key}")
    assert not is_found(passkey, f" {passkey.key}0")
    assert not is_found(passkey, f" {passkey.key[:4]}")


@pytest.mark.parametrize("name", METHODS)
def test_methods_by_name_read_no_more_than_the_budget(name):
    hshare = dataclasses.replace(HSHARE, num_sinks=4, num_critical=32, num_recent=12, refresh_interval=1)
    method = method_named(name, hshare, max_new_tokens=4)
    (row,) = random_rows(26, lengths=(200,), more=1)
    _, state = prefill_rows([row[:200]], hshare=method)
    _, state = hshare_jax.decode_step(params(), jnp.asarray(row[200:201]), state, config=MODEL)
    if state.method_state is None:
        assert (name, method) == ("dense", None)
        return
    for layer in range(MODEL.num_layers):
        reads = np.asarray(state.method_state.mark_reads(layer, state.cache, MODEL))[0].sum(axis=-1)
        most = 201 if layer < hshare.dense_layers else hshare.budget + (name == "snapkv")
        assert (reads <= most).all()
        assert (reads >= most - 16).all()


def test_names_and_budgets_that_are_none_are_refused():
    with pytest.raises(ValueError, match="method='magic' must be one of hshare, dense"):
        method_named("magic", HSHARE)
    with pytest.raises(ValueError, match="a budget of 12 tokens is too small for quest; it needs at least 16"):
        method_named("quest", HSHARE)
    assert start_method(None, MODEL, prefill_rows(prompts(random_rows(1)), hshare=None)[1].cache) is None


def test_intervals_hold_what_they_are_of_and_pair_their_arrays():
    rng = np.random.default_rng(0)
    base = rng.exponential(size=(8, 256))
    low, high = interval(np.mean, base)
    assert low < base.mean() < high
    # The mean of 64 independent blocks of 32 exponentials: 1 / sqrt(2048) is the standard error.
    assert (high - low) == pytest.approx(2 * 1.96 / np.sqrt(2048), rel=0.2)
    # Twice the same numbers: a ratio without spread, which unpaired draws would not give.
    assert interval(mean_ratio, 2 * base, base) == pytest.approx((2, 2))
