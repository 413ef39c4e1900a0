"""Recall: the mass of exact attention on the tokens that are read, against a float64 oracle."""

import jax.numpy as jnp
import method_oracle
import numpy as np
import pytest
from tiny_decoder import HSHARE, LENGTHS, MODEL, oracle_row, params, prefill_rows, random_rows, vary

from hshare_jax.decode_step import decode_step
from hshare_jax.evaluation.recall import measure_recall, recall_of
from hshare_jax.evaluation.teacher_forcing import score_steps
from hshare_jax.methods import H2O, StreamingLLM

SAME = 1e-5  # between two float32 programs of the same model
F32 = 1e-4  # against float64
METHODS = {
    "hshare": vary(HSHARE, tail=None),  # the exact decoder attends to what is read alone
    "h2o": H2O(num_heavy=5, num_recent=4),
    "streaming_llm": StreamingLLM(2, num_recent=6),
}


@pytest.mark.parametrize("name", METHODS)
def test_recall_is_the_mass_of_exact_attention_on_what_is_read(name):
    rows = random_rows(23, lengths=(60,), more=3)
    _, state = prefill_rows([rows[0][:60]], method=METHODS[name])
    state = measure_recall(state)
    exact = oracle_row()
    for token in rows[0][:60]:
        exact.dense_step(token)
    for step in range(3):
        _, state = decode_step(params(), jnp.asarray(rows[0][60 + step :][:1]), state, config=MODEL)
        marks = [state.method_state.mark_reads(layer, state.cache, MODEL)[0] for layer in range(MODEL.num_layers)]
        reads = [[set(np.flatnonzero(m[n * len(m) // 6])) for n in range(6)] for m in np.asarray(marks, object)]
        exact.step(rows[0][60 + step], lambda layer, length, reads=reads: reads[layer])
        caught = [
            method_oracle.weights(exact, layer, 60 + step)[n, sorted(reads[layer][n])].sum()
            for layer in range(MODEL.num_layers)
            for n in range(6)
        ]
        np.testing.assert_allclose(recall_of(state, MODEL), [np.mean(caught)], atol=F32)


def test_recall_is_measured_on_the_first_of_every_so_many_steps_and_changes_nothing():
    rows = random_rows(24, lengths=(60,), more=6)
    tokens = jnp.asarray(rows[0][None, 60:])
    plain, measured = (prefill_rows([rows[0][:60]], method=HSHARE)[1] for _ in range(2))
    expected, _ = score_steps(params(), tokens, plain, config=MODEL)
    found, _ = score_steps(params(), tokens, measure_recall(measured, every=3), config=MODEL, observe=recall_of)
    np.testing.assert_allclose(found.loss, expected.loss, atol=SAME)
    np.testing.assert_array_equal(np.asarray(found.observed)[:, 0] > 0, [True, False, False, True, False])


def test_a_state_that_does_not_measure_recall_is_refused():
    _, state = prefill_rows([row[:n] for row, n in zip(random_rows(1), LENGTHS, strict=True)], method=HSHARE)
    with pytest.raises(
        ValueError, match=r"the state does not measure recall: give measure_recall\(state\) to the steps"
    ):
        recall_of(state, MODEL)
