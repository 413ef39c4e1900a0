"""Logits equal those of transformers for every kind of configuration, and those of committed fixtures without torch."""

import functools
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from logit_cases import CASES, NUM_TOKENS, VOCAB_SIZE, transformers_logits, transformers_model
from random_weights import random_params

from hshare_jax.attend import prefill_attend
from hshare_jax.decode_state import init_state
from hshare_jax.decode_step import decode_step
from hshare_jax.kv_cache import init_cache
from hshare_jax.methods import double_sparsity
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.models.config import ModelConfig, config_from_hf
from hshare_jax.models.decoder import run_decoder, unembed
from hshare_jax.prefill import prefill

TOLERANCE = 1e-4  # absolute, float32, logits of about 5: two computations that add up in different orders
FIXTURES = Path(__file__).parent.parent / "fixtures" / "logits.npz"


@functools.cache
def fixtures() -> dict[str, np.ndarray]:
    with np.load(FIXTURES) as file:
        return dict(file)


@functools.partial(jax.jit, static_argnames="config")
def forward(params: dict, tokens: jax.Array, *, config: ModelConfig) -> jax.Array:
    """Logits [T, V] of one row [T]."""
    positions = jnp.arange(tokens.size, dtype=jnp.int32)[None, :]
    attend = prefill_attend(config, positions, jnp.zeros((1,), jnp.int32))
    empty = (init_cache(config, 1, tokens.size, jnp.dtype(jnp.float32)), None)
    hidden, _ = run_decoder(params, tokens[None], positions, attend, empty, config=config)
    return unembed(params, hidden[0], config=config)


def logits_of_all_positions(config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(forward(random_params(config), jnp.asarray(tokens, jnp.int32), config=config))


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_fixtures_of_transformers(name):
    stored = fixtures()
    config = config_from_hf(json.loads(stored["configs"].tobytes())[name])
    logits = logits_of_all_positions(config, stored["tokens"])
    expected = stored["logits"][list(CASES).index(name)]
    assert np.abs(expected).max() > 1  # logits near 0 would compare nothing
    np.testing.assert_allclose(logits[stored["positions"]], expected, atol=TOLERANCE, rtol=0)


def test_no_two_cases_of_the_fixtures_agree():
    # A case would test nothing if both programs ignored its setting.
    cases = zip(CASES, fixtures()["logits"], strict=True)
    same = [{a, b} for (a, x), (b, y) in itertools.combinations(cases, 2) if np.abs(x - y).max() < 0.01]
    assert same == [{"llama, grouped queries", "mistral"}]  # one model under two names


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers_at_every_position(name):
    pytest.importorskip("torch", reason="the extra 'torch' is not installed")
    model = transformers_model(name)
    tokens = np.random.default_rng(11).integers(0, VOCAB_SIZE, NUM_TOKENS)
    logits = logits_of_all_positions(config_from_hf(model.config.to_dict()), tokens)
    np.testing.assert_allclose(logits, transformers_logits(model, tokens), atol=TOLERANCE, rtol=0)


# Sparse decoding whose budget covers every row, and which estimates nothing, is dense decoding.
COVERING = double_sparsity(HShareSettings(num_critical=120, min_length=0))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llama, biases", None),
        ("mistral, window", None),
        ("rope llama3", None),
        ("qwen3", None),
        ("qwen3", COVERING),
        ("smollm3", COVERING),
    ],
)
def test_prefill_and_decode_equal_transformers(name, method):
    pytest.importorskip("torch", reason="the extra 'torch' is not installed")
    model = transformers_model(name)
    config = config_from_hf(model.config.to_dict())
    params = random_params(config)
    tokens = np.random.default_rng(12).integers(0, VOCAB_SIZE, (3, NUM_TOKENS))
    lengths = np.array([1, 8, 33])  # the window is 9
    expected = np.stack([transformers_logits(model, row) for row in tokens])
    state = init_state(config, 3, NUM_TOKENS, method=method)
    prompts = jnp.asarray(tokens[:, :33], jnp.int32), jnp.asarray(lengths, jnp.int32)
    logits, state = prefill(params, *prompts, state, config=config, method=method)
    rows = np.arange(3)
    for step in range(6):
        np.testing.assert_allclose(np.asarray(logits), expected[rows, lengths + step - 1], atol=TOLERANCE, rtol=0)
        new = jnp.asarray(tokens[rows, lengths + step], jnp.int32)
        logits, state = decode_step(params, new, state, config=config)
