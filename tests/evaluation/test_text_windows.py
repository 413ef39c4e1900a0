"""Windows: where they are cut, and scores of their decode steps by the definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import random_params
from tiny_decoder import HSHARE, MODEL, prefill_rows
from tiny_tokenizer import LETTERS, byte_tokenizer

from hshare_jax.evaluation import teacher_forcing
from hshare_jax.evaluation.prefilled import prefill_for
from hshare_jax.evaluation.text_windows import Scorer, cut_windows
from hshare_jax.methods.hshare.shared_lists import SharedLists
from hshare_jax.models.pretrained import Model

SAME = 1e-5  # between two float32 programs of the same model
F32 = 1e-4  # against float64
TINY = Model(
    dataclasses.replace(MODEL, max_positions=512), random_params(MODEL), byte_tokenizer(LETTERS), (), "tiny", ""
)
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
            logits, _ = prefill_rows([np.asarray(window.tokens[: 93 + step])], method=None)
            log_p = np.asarray(jax.nn.log_softmax(logits[0]))
            np.testing.assert_allclose(dense["loss"][b, step], -log_p[window.tokens[93 + step]], atol=F32)
    assert (sparse["reads"] < 40).all()
    assert (sparse["divergence"] > 0).any()
    np.testing.assert_array_equal(np.isnan(sparse["recall"][0]), [False] + [True] * 7)
    without = scorer.score(HSHARE, recall_every=None)
    assert np.isnan(without["recall"]).all()
    np.testing.assert_allclose(without["loss"], sparse["loss"], atol=SAME)


def read_of(windows, length):
    return jnp.asarray([window.tokens[:length] for window in windows], jnp.int32), jnp.full((len(windows),), length)


def test_one_dispatch_scores_a_chunk_and_one_program_all_ratios(monkeypatch):
    windows = cut_windows(TINY, "rain.txt", TEXT, context=100, count=2)
    calls, scored = [], teacher_forcing.score_steps
    monkeypatch.setattr(teacher_forcing, "score_steps", lambda *a, **k: calls.append(0) or scored(*a, **k))
    jax.clear_caches()  # another file may have compiled the same program
    before = scored._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
    ratios = [HSHARE, HSHARE.with_sharing_ratio("1/3-1-1/3")]
    scorer = Scorer(TINY, windows, 8, ratios)
    plans = []
    for method in ratios:
        state = scorer.prefilled.start(method)
        assert isinstance(state.method_state, SharedLists)
        plans.append(np.asarray(state.method_state.source))
        own = prefill_for(TINY, *read_of(windows, 92), 100, [method]).start(method).method_state
        assert isinstance(own, SharedLists)
        np.testing.assert_array_equal(plans[-1], own.source)
        scorer.score_state(state, method)
    assert (plans[0] != plans[1]).any()
    assert len(scorer.prefilled.memo) == 1
    assert len(calls) == 2
    assert scored._cache_size() == before + 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 1}, "context=1 must lie between 2 and the model's 512"),
        ({"context": 513}, "context=513 must lie between"),
        (
            {"context": 300, "text": "short"},
            "context=300 must be less than the .* tokens that rain.txt has to cut from",
        ),
    ],
)
def test_windows_that_cannot_be_cut_are_refused(changes, message):
    given = {"text": TEXT, "context": 100, "count": 1, **changes}
    with pytest.raises(ValueError, match=message):
        cut_windows(TINY, "rain.txt", given.pop("text"), **given)


def test_windows_all_differ_or_are_refused():
    text = TEXT[:100]
    size = len(byte_tokenizer()(text)["input_ids"])  # the tests' own tokenizer writes no <s>
    most = cut_windows(TINY, "rain.txt", text, context=size - 4, count=3)
    assert len({window.tokens for window in most}) == len({window.id for window in most}) == 3
    with pytest.raises(ValueError, match=r"count=4 must be at most 3: rain.txt has no more windows that differ"):
        cut_windows(TINY, "rain.txt", text, context=size - 4, count=4)
    assert len(cut_windows(TINY, "rain.txt", text, context=size - 1, count=1)) == 1


def test_a_window_needs_a_prompt_before_its_scored_steps():
    with pytest.raises(ValueError, match="steps=100 must be less than the windows' 100 tokens"):
        Scorer(TINY, cut_windows(TINY, "rain.txt", TEXT, context=100, count=1), 100, [None])
