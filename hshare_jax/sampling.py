"""Sampling: from logits to the next token, the same for a row whatever batch it is in."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool

from hshare_jax.shapes import Logits, PerRow

COLDEST = 1e-6


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn; names and order as in transformers. The default is greedy."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # keep the k likeliest; 0: all
    top_p: float = 1.0  # then the fewest that hold this probability; 1: all
    min_p: float = 0.0  # then those at least this times as likely as the likeliest; 0: all
    repetition_penalty: float = (
        1.0  # first of all, divide what was seen by this (arXiv 1909.05858, section 4.1); 1: none
    )

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be at least 0 (0 is greedy), and finite")
        if not isinstance(self.top_k, int):
            raise ValueError(f"top_k={self.top_k!r} must be a whole number")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be at least 0 (0 keeps all)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1] (1 keeps all)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must lie in [0, 1] (0 keeps all)")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be above 0 (1 is none), and finite")


def sample(logits: Logits, keys: Array, config: SamplingConfig, *, seen: Bool[Array, "B V"] | None = None) -> PerRow:
    """Returns the next token of each row.

    Args:
        logits: float32 [B, V].
        keys: a typed random key per row [B]; unused when greedy.
        config: the method.
        seen: tokens of the prompt and the output so far; needed for a repetition penalty.
    """
    if config.repetition_penalty != 1.0:
        if seen is None:
            raise ValueError(f"repetition_penalty={config.repetition_penalty} needs `seen`, the tokens so far")
        penalised = jnp.where(logits > 0, logits / config.repetition_penalty, logits * config.repetition_penalty)
        logits = jnp.where(seen, penalised, logits)
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # From the peak down, and not below what float32 can divide by: the coldest draws are the greedy ones.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / max(config.temperature, COLDEST)
    logits = keep_likely(logits, config)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def keep_likely(logits: Logits, config: SamplingConfig) -> Logits:
    """Returns the logits with all that top-k, top-p and min-p exclude at -inf; the likeliest token always stays."""
    if 0 < config.top_k < logits.shape[-1]:
        kth = lax.top_k(logits, config.top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if config.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        # A token stays while those before it hold less than top_p.
        is_kept = jnp.cumsum(probabilities, axis=-1) - probabilities < config.top_p
        least = jnp.where(is_kept, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if config.min_p > 0:
        peak = logits.max(axis=-1, keepdims=True)
        logits = jnp.where(logits < peak + jnp.log(config.min_p), -jnp.inf, logits)
    return logits
