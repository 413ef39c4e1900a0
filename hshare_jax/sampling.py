"""Sampling: from logits to the next token. The result of a row does not depend on its batch."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool

from hshare_jax.sampling_params import SamplingParams
from hshare_jax.shapes import Logits, PerRow

COLDEST = 1e-6  # the lowest temperature that logits are divided by
LEAST_TOP_P = 1e-30  # float32 rounds smaller ones to 0, and then no token would stay
FARTHEST = 1e30  # how far from 0 a repetition penalty may take a logit


def sample(logits: Logits, keys: Array, sampling: SamplingParams, *, seen: Bool[Array, "B V"] | None = None) -> PerRow:
    """The next token of each row.

    Args:
        logits: float32 [B, V].
        keys: a typed random key per row [B]; unused when greedy.
        sampling: how tokens are drawn.
        seen: which tokens occur in the prompt and the output so far; a repetition penalty needs it.
    """
    if sampling.repetition_penalty != 1.0:
        if seen is None:
            raise ValueError(f"repetition_penalty={sampling.repetition_penalty} needs `seen`, the tokens so far")
        penalised = jnp.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = jnp.where(seen, jnp.clip(penalised, -FARTHEST, FARTHEST), logits)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Relative to the peak, and with a temperature that float32 can divide by: the coldest draws are greedy.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / max(sampling.temperature, COLDEST)
    logits = keep_likely(logits, sampling)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def keep_likely(logits: Logits, sampling: SamplingParams) -> Logits:
    """The logits, with -inf for tokens that top-k, top-p and min-p exclude. The most probable token always stays."""
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        # A token stays while the tokens before it hold less than top_p.
        is_kept = jnp.cumsum(probabilities, axis=-1) - probabilities < max(sampling.top_p, LEAST_TOP_P)
        least = jnp.where(is_kept, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.min_p > 0:
        peak = logits.max(axis=-1, keepdims=True)
        logits = jnp.where(logits < peak + jnp.log(sampling.min_p), -jnp.inf, logits)
    return logits
