"""Log-likelihoods: transformers' for dense decoding, the oracle's for HShare, each request for itself."""

import dataclasses
import importlib

import numpy as np
import pytest
from tiny_decoder import HSHARE, MODEL, oracle_rows, params, vary
from tiny_models import tiny_model, torch

from hshare_jax.evaluation import likelihood
from hshare_jax.evaluation.likelihood import _pad_steps, log_likelihoods
from hshare_jax.models.pretrained import Model, load_model

CLOSE = 1e-3  # absolute, sums of up to 20 losses of about 5 in float32
SHALLOW = dataclasses.replace(MODEL, num_layers=2, windows=(None,) * 2)
TINY = Model(SHALLOW, params(SHALLOW), None, (), "tiny", "0" * 16)
# Lengths of context and continuation: a context with nothing before it, one step or many, within the budget of 12 and
# beyond. The steps are 1 and 20, so that few programs are compiled.
SIZES = ((1, 1), (1, 20), (2, 1), (7, 20), (40, 1), (60, 20))
BATCH = len(SIZES)


def random_requests(seed, vocab_size=SHALLOW.vocab_size, sizes=SIZES):
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(0, vocab_size, size).tolist() for size in pair) for pair in sizes]


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def score(logits, continuation):
    """Sum and greediness, from the logits that predict each token of a continuation."""
    log_p, places = log_softmax(logits), np.arange(len(continuation))
    return log_p[places, continuation].sum(), bool((log_p.argmax(axis=-1) == continuation).all())


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A model of transformers with small logits, and the same model loaded here."""
    directory, model = tmp_path_factory.mktemp("llama"), tiny_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight") or name == "lm_head.weight":
                parameter.mul_(0.15)
    model.save_pretrained(directory)
    return model, load_model(directory)


def logits_of(theirs, tokens):
    with torch.no_grad():
        return theirs(torch.tensor([tokens])).logits[0].numpy()


def scores_of(theirs, requests):
    return [score(logits_of(theirs, c + k)[len(c) - 1 : -1], k) for c, k in requests]


def assert_close(found, expected):
    np.testing.assert_allclose([total for total, _ in found], [total for total, _ in expected], atol=CLOSE, rtol=0)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]


def test_dense_likelihoods_are_those_of_transformers(llama):
    theirs, ours = llama
    requests = random_requests(1, vocab_size=ours.config.vocab_size)
    assert_close(log_likelihoods(ours, requests, method=None, batch_size=BATCH), scores_of(theirs, requests))


def test_greedy_is_told_from_every_token(llama):
    theirs, ours = llama
    requests = []
    for context in ([5], [5, 3, 8]):
        chosen: list[int] = []
        while len(chosen) < 4:
            chosen.append(int(logits_of(theirs, context + chosen)[-1].argmax()))
        requests += [(context, chosen), (context, [chosen[0] ^ 1, *chosen[1:]]), (context, chosen + 16 * [7])]
    found = log_likelihoods(ours, requests, method=None, batch_size=BATCH)
    assert [is_greedy for _, is_greedy in found] == [True, False, False] * 2


def test_requests_as_long_as_the_model_are_scored_beside_shorter_ones(llama):
    # 128 steps are computed for all: beyond the model's 128 positions for most rows, whose own tokens all fit.
    theirs, ours = llama
    requests = random_requests(5, vocab_size=ours.config.vocab_size, sizes=((89, 40), (3, 34), (128, 1), (1, 128)))
    assert_close(log_likelihoods(ours, requests, method=None, batch_size=BATCH), scores_of(theirs, requests))


def test_shared_likelihoods_are_those_of_decode_steps():
    # The context without its last token is the prompt; all other tokens are read by steps of the method.
    requests = random_requests(2)
    found = log_likelihoods(TINY, requests, method=HSHARE, batch_size=BATCH)[2:]
    requests = requests[2:]  # those that have a prompt
    rows = oracle_rows([np.array(context[:-1]) for context, _ in requests], HSHARE, SHALLOW)
    expected = []
    for row, (context, continuation) in zip(rows, requests, strict=True):
        expected.append(score([row.decode(t) for t in [context[-1], *continuation[:-1]]], continuation))
    assert_close(found, expected)


def test_a_batch_of_different_lengths_equals_each_request_alone():
    requests = random_requests(3)
    together = log_likelihoods(TINY, requests, method=HSHARE, batch_size=BATCH)
    for scores, request in list(zip(together, requests, strict=True))[1::2]:  # those of 20 steps
        assert_close([scores], log_likelihoods(TINY, [request], method=HSHARE, batch_size=1))


def test_a_budget_that_covers_the_text_equals_dense_and_a_small_one_does_not():
    requests = random_requests(4)
    covering = vary(HSHARE, num_critical=100)
    dense, covered, sparse = (
        log_likelihoods(TINY, requests, method=method, batch_size=BATCH) for method in (None, covering, HSHARE)
    )
    assert_close(covered, dense)
    assert abs(sparse[-1][0] - dense[-1][0]) > 10 * CLOSE


def test_every_batch_is_one_scan_and_one_program_serves_them_all(monkeypatch):
    calls, traces, done = [], [], []
    decode = importlib.import_module("hshare_jax.decode_step")  # the package's attribute is the function
    score_text, attend = likelihood.score_text, decode.decode_attend
    monkeypatch.setattr(likelihood, "score_text", lambda *a, **k: calls.append(a[1].shape) or score_text(*a, **k))
    monkeypatch.setattr(decode, "decode_attend", lambda *args: traces.append(args) or attend(*args))
    sizes = [(context, steps) for context in (2, 30, 71, 9, 11) for steps in (17, 20, 31)]
    requests = random_requests(6, sizes=sizes)
    # 5 rows: no other test has so many.
    found = log_likelihoods(TINY, requests, method=None, batch_size=5, progress=done.append)
    assert [len(scores) for scores in done] == [5, 5, 5]
    assert [score for _, score in sorted(item for scores in done for item in scores.items())] == found
    assert calls == [(5, 33)] * 3
    assert len(traces) == 1


def test_few_more_steps_are_computed_than_asked_for():
    padded = [_pad_steps(num_steps) for num_steps in range(1, 8193)]
    assert all(steps <= more < max(2 * steps, 5) for steps, more in enumerate(padded, start=1))
    assert all(more <= 1.25 * steps for steps, more in enumerate(padded, start=1) if steps > 256)
    assert len(set(padded)) == 28


@pytest.mark.parametrize(
    ("requests", "settings", "message"),
    [
        ([([1], [2]), ([], [2])], {}, r"requests\[1\] has an empty context"),
        ([([1], [2]), ([1], [])], {}, r"requests\[1\] has an empty continuation"),
        ([([1], [2]), ([1] * 1000, [2] * 26)], {}, r"requests\[1\] has 1000 tokens of context and 26 .*1024 positions"),
        ([([1], [48])], {}, r"requests\[0\] holds token id 48"),
        ([([-1, 2], [4])], {}, r"requests\[0\] holds token id -1"),
        ([([1], [2])], {"batch_size": 0}, "batch_size=0 must be at least 1"),
        ([([1], [2])], {"impl": "fast"}, "impl"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_is_computed(monkeypatch, requests, settings, message):
    monkeypatch.setattr(likelihood, "prefill_prompts", None)
    with pytest.raises(ValueError, match=message):
        log_likelihoods(TINY, requests, **{"method": None, "batch_size": 2, **settings})


def test_no_requests_have_no_scores():
    assert log_likelihoods(TINY, [], method=HSHARE, batch_size=2) == []
