"""Sampling: the tokens that top-k, top-p, min-p and the penalty keep, and that rows draw independently."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hshare_jax.sampling import SamplingParams, keep_likely, sample

B, V = 4, 12
kept = jax.jit(keep_likely, static_argnames="sampling")
drawn = jax.jit(sample, static_argnames="sampling")
LOGITS = hnp.arrays(np.float32, (B, V), elements=st.floats(-6, 6, width=16))
CASES = [
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=1.0, top_k=5),
    SamplingParams(temperature=1.0, top_k=V + 3),
    SamplingParams(temperature=1.0, top_p=0.15),
    SamplingParams(temperature=1.0, top_p=0.8),
    SamplingParams(temperature=1.0, min_p=0.3),
    SamplingParams(temperature=1.0, min_p=1.0),
    SamplingParams(temperature=1.0, top_k=7, top_p=0.7, min_p=0.1),
]


def keys(*seeds):
    return jnp.stack([jax.random.key(seed) for seed in seeds])


def random_logits(seed, rows=B):
    # All logits differ, so that no threshold meets a tie.
    return np.random.default_rng(seed).standard_normal((rows, V)).astype(np.float32) * 2


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def expected_tokens(logits, sampling):
    """The tokens that one row keeps, by the definitions applied one after the other."""
    tokens = sorted(range(V), key=lambda token: -logits[token])
    if sampling.top_k:
        tokens = tokens[: sampling.top_k]
    if sampling.top_p < 1:
        probabilities = softmax(logits[tokens].astype(np.float64))
        count = next(
            n for n in range(1, len(tokens) + 1) if n == len(tokens) or probabilities[:n].sum() >= sampling.top_p
        )
        tokens = tokens[:count]
    probabilities = softmax(logits[tokens].astype(np.float64))
    return {token for token, p in zip(tokens, probabilities, strict=True) if p >= sampling.min_p * probabilities[0]}


def test_greedy_takes_the_largest_logit_and_the_first_on_ties():
    logits = jnp.asarray([[0.0, 3.0, 1.0], [2.0, 2.0, 1.0]])
    assert drawn(logits, keys(0, 1), SamplingParams()).tolist() == [1, 0]


@pytest.mark.parametrize("sampling", CASES)
def test_the_kept_tokens_equal_the_definitions(sampling):
    logits = random_logits(1)
    found = np.asarray(kept(jnp.asarray(logits), sampling))
    for b in range(B):
        tokens = expected_tokens(logits[b], sampling)
        assert set(np.flatnonzero(np.isfinite(found[b])).tolist()) == tokens
        np.testing.assert_array_equal(found[b, sorted(tokens)], logits[b, sorted(tokens)])


@pytest.mark.parametrize("sampling", CASES)
@hypothesis.given(logits=LOGITS)
def test_the_likeliest_token_always_stays(sampling, logits):
    found = np.asarray(kept(jnp.asarray(logits), sampling))
    rows = np.arange(B)
    np.testing.assert_array_equal(found[rows, logits.argmax(axis=1)], logits.max(axis=1))
    assert (np.isneginf(found) | (found == logits)).all()


@pytest.mark.parametrize("sampling", CASES)
def test_the_kept_tokens_equal_transformers(sampling):
    torch = pytest.importorskip("torch", reason="the extra 'torch' is not installed")
    from transformers.generation import logits_process

    logits = random_logits(2)
    scores = torch.from_numpy(logits)
    if sampling.top_k:
        scores = logits_process.TopKLogitsWarper(sampling.top_k)(None, scores)  # pyright: ignore[reportArgumentType]
    if sampling.top_p < 1:
        scores = logits_process.TopPLogitsWarper(sampling.top_p)(None, scores)  # pyright: ignore[reportArgumentType]
    if sampling.min_p:
        scores = logits_process.MinPLogitsWarper(sampling.min_p)(None, scores)  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(kept(jnp.asarray(logits), sampling), scores.numpy())


def test_the_repetition_penalty_divides_positive_logits_and_multiplies_negative_logits():
    logits = jnp.asarray([[4.0, 3.0, -1.0], [-1.0, -3.0, -1.5]])
    seen = jnp.asarray([[True, False, True], [True, False, False]])
    sampling = SamplingParams(repetition_penalty=2.0)
    assert drawn(logits, keys(0, 1), sampling, seen=seen).tolist() == [1, 2]
    assert drawn(logits, keys(0, 1), sampling, seen=jnp.zeros_like(seen)).tolist() == [0, 0]


def test_the_repetition_penalty_equals_transformers():
    torch = pytest.importorskip("torch", reason="the extra 'torch' is not installed")
    from transformers.generation import logits_process

    logits, prompts = random_logits(3), np.array([[0, 1], [5, 5], [7, 11], [2, 3]])
    seen = np.zeros((B, V), bool)
    np.put_along_axis(seen, prompts, True, axis=1)
    process = logits_process.RepetitionPenaltyLogitsProcessor(3.0)
    expected = process(torch.from_numpy(prompts), torch.from_numpy(logits)).argmax(-1)  # pyright: ignore[reportArgumentType]
    sampling = SamplingParams(repetition_penalty=3.0)
    assert drawn(jnp.asarray(logits), keys(0, 1, 2, 3), sampling, seen=jnp.asarray(seen)).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "sampling", [SamplingParams(temperature=0.5), SamplingParams(temperature=2.0, top_k=4, min_p=0.05)]
)
def test_draws_are_as_frequent_as_the_kept_tokens_are_likely(sampling):
    draws, logits = 20_000, random_logits(4, 1)[0]
    tokens = sorted(expected_tokens(logits / sampling.temperature, sampling))
    expected = np.zeros(V)
    expected[tokens] = softmax(logits[tokens].astype(np.float64) / sampling.temperature)
    seeds = jax.random.split(jax.random.key(5), draws)
    found = np.bincount(np.asarray(drawn(jnp.tile(logits, (draws, 1)), seeds, sampling)), minlength=V) / draws
    # The limit is five standard deviations of a frequency.
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws)).all()


def test_a_rows_draw_depends_on_its_own_seed_and_logits_only():
    sampling = SamplingParams(temperature=1.5)
    logits = random_logits(6, 40)
    together = drawn(jnp.asarray(logits), keys(*range(40)), sampling).tolist()
    for b in (0, 7, 39):
        assert drawn(jnp.asarray(logits[b : b + 1]), keys(b), sampling).tolist() == together[b : b + 1]
    assert len(set(drawn(jnp.tile(logits[:1], (40, 1)), keys(*range(40)), sampling).tolist())) > 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, r"temperature=-0.1 must be at least 0 \(0 is greedy\)"),
        ({"temperature": "hot"}, "temperature='hot' must be a number"),
        ({"temperature": float("nan")}, "temperature=nan must be at least 0"),
        ({"top_k": -1}, r"top_k=-1 must be at least 0 \(0 keeps all\)"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p=1.1 must lie in \(0, 1\]"),
        ({"min_p": -0.5}, r"min_p=-0.5 must lie in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty=0.0 must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(unchecked, settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)


def test_the_coldest_temperature_is_greedy():
    logits = jnp.asarray([[1.0, 3.0, 2.0], [0.5, -1.0, 0.4]])
    found = sample(logits, keys(0, 1), SamplingParams(temperature=1e-40))
    assert found.tolist() == [1, 0]


def test_a_penalty_without_the_tokens_so_far_is_refused():
    with pytest.raises(ValueError, match=r"repetition_penalty=1\.5 needs `seen`"):
        sample(jnp.zeros((1, 3)), keys(0), SamplingParams(repetition_penalty=1.5))


def test_parameters_that_float32_rounds_to_nothing_still_draw_a_likely_token():
    logits = jnp.asarray([[1.0, 3.0, -2.0, 2.0]])
    keys, seen = jax.random.split(jax.random.key(0), 1), jnp.asarray([[False, False, False, True]])
    assert drawn(logits, keys, SamplingParams(temperature=1.0, top_p=1e-50)).tolist() == [1]
    assert drawn(logits, keys, SamplingParams(temperature=1e-50)).tolist() == [1]
    # A penalty below 1 makes seen tokens likelier.
    for temperature in (0.0, 1.0):
        sampling = SamplingParams(temperature=temperature, repetition_penalty=1e-50)
        assert drawn(logits, keys, sampling, seen=seen).tolist() == [3]
