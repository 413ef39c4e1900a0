"""Forced steps: their scores equal those that NumPy computes from the logits of full forwards."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import HSHARE, LENGTHS, MODEL, oracle_rows, params, prefill_rows, random_rows

from hshare_jax.evaluation.teacher_forcing import forced_logits, score_steps, token_agreement
from hshare_jax.models.pretrained import Model

F32 = 1e-4  # absolute, on float32 logits of about 5, and on losses and divergences of theirs, against float64
SAME = 1e-5  # between two float32 programs of the same model
STEPS = 6
ROWS = random_rows(1, more=STEPS + 1)
CONTINUATIONS = np.stack([row[n:] for row, n in zip(ROWS, LENGTHS, strict=True)])  # [B, STEPS + 1]


def prompted(method):
    return prefill_rows([row[:n] for row, n in zip(ROWS, LENGTHS, strict=True)], method=method)[1]


def full_forward_logits():
    """Each step's logits, from a prefill of everything before it [STEPS, B, V]."""
    return np.stack(
        [
            np.asarray(
                prefill_rows([row[: n + step + 1] for row, n in zip(ROWS, LENGTHS, strict=True)], method=None)[0]
            )
            for step in range(STEPS)
        ]
    ).astype(np.float64)


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def dense():
    return full_forward_logits()


def sparse_logits():
    """Logits [STEPS, B, V] and tokens read [STEPS, B] of the float64 oracle."""
    rows = oracle_rows([row[:n] for row, n in zip(ROWS, LENGTHS, strict=True)], HSHARE)
    logits, reads = [], []
    for step in range(STEPS):
        logits.append([row.decode(CONTINUATIONS[b, step]) for b, row in enumerate(rows)])
        reads.append([row.num_read for row in rows])
    return np.array(logits), np.array(reads)


def test_forced_logits_are_those_of_the_full_forward(dense):
    logits, _ = forced_logits(params(), jnp.asarray(CONTINUATIONS[:, :-1]), prompted(None), config=MODEL)
    np.testing.assert_allclose(logits, dense, atol=SAME, rtol=0)


@pytest.mark.parametrize("method", [None, HSHARE], ids=["dense", "shared"])
def test_scores_are_those_of_the_logits(dense, method):
    tokens = jnp.asarray(CONTINUATIONS)
    if method is None:
        expected, reads = dense, np.array(LENGTHS)[None, :] + np.arange(1, STEPS + 1)[:, None]
    else:
        expected, reads = sparse_logits()
    reference = jnp.asarray(dense, jnp.float32)
    scores, _ = score_steps(params(), tokens, prompted(method), config=MODEL, reference=reference)
    following = CONTINUATIONS[:, 1:].T
    loss = -np.take_along_axis(log_softmax(expected), following[:, :, None], axis=-1)[:, :, 0]
    np.testing.assert_allclose(scores.loss, loss, atol=F32, rtol=0)
    np.testing.assert_array_equal(scores.chosen, expected.argmax(axis=-1))
    np.testing.assert_allclose(scores.reads, reads, rtol=SAME)
    p, q = log_softmax(dense), log_softmax(expected)
    assert scores.divergence is not None
    np.testing.assert_allclose(scores.divergence, (np.exp(p) * (p - q)).sum(axis=-1), atol=F32, rtol=0)
    assert scores.agrees is not None
    np.testing.assert_array_equal(scores.agrees, dense.argmax(axis=-1) == expected.argmax(axis=-1))
    if method is not None:
        assert not np.asarray(scores.agrees).all()  # the long row is read sparsely
        assert np.asarray(scores.divergence)[:, -1].max() > 100 * F32


def test_without_a_reference_nothing_is_compared():
    scores, _ = score_steps(params(), jnp.asarray(CONTINUATIONS), prompted(None), config=MODEL)
    assert (scores.divergence, scores.agrees) == (None, None)


@pytest.mark.parametrize("method", [None, HSHARE], ids=["dense", "shared"])
def test_agreement_is_the_share_of_the_continuation_that_would_be_chosen(dense, method):
    # Each row's continuation is what the model chooses, except at some places: a share of a half or of none.
    model = Model(MODEL, params(), None, (), "tiny", "0" * 16)
    chosen = dense.argmax(axis=-1) if method is None else sparse_logits()[0].argmax(axis=-1)
    prompts = [row[:n].tolist() for row, n in zip(ROWS, LENGTHS, strict=True)]
    continuations = [row.tolist() for row in CONTINUATIONS]
    expected = [float(np.mean(chosen[:, b] == CONTINUATIONS[b, 1:])) for b in range(len(ROWS))]
    assert token_agreement(model, prompts, continuations, method=method) == pytest.approx(expected)
    # The last token is only predicted: with it as the model would choose, one more agrees.
    for b, row in enumerate(continuations):
        row[-1] = int(chosen[-1, b])
        expected[b] = float(np.mean(chosen[:, b] == np.array(row[1:])))
    assert token_agreement(model, prompts, continuations, method=method) == pytest.approx(expected)
    assert min(expected) >= 1 / STEPS


@pytest.mark.parametrize("continuations", [[[1, 2]], [[1, 2], [1]]])
def test_continuations_that_do_not_fit_are_refused(continuations):
    model = Model(dataclasses.replace(MODEL), params(), None, (), "tiny", "0" * 16)
    with pytest.raises(ValueError, match="continuations must hold at least 2 tokens for each of the 2 prompts"):
        token_agreement(model, [[1], [2]], continuations, method=None)
