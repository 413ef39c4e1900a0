"""Rotary position embedding: the frequencies of each kind of scaling, and the rotation of queries and keys."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from hshare_jax.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """(frequencies [H // 2] in radians per position, a factor on queries and keys).

    The factor is 1 except for yarn, which sharpens attention on long contexts.

    Sources: RoFormer (arXiv 2104.09864, section 3.4.2); linear: position interpolation (arXiv 2306.15595); llama3: the
        LLaMA 3.1 model code; yarn: arXiv 2309.00071, section 3.
    """
    frequencies = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.divisors is not None:
        return frequencies / np.asarray(rope.divisors), 1.0
    if rope.kind == "linear":
        return frequencies / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, frequencies), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, frequencies, head_dim), _yarn_attention_factor(rope)
    return frequencies, 1.0


def _llama3(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """Keeps high frequencies and divides low ones by `factor`; between them it interpolates.

    A frequency is high if it makes many turns within the context that the model was trained on.
    """
    turns = rope.original_max_positions * frequencies / (2 * math.pi)
    is_kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    is_kept = np.clip(is_kept, 0.0, 1.0)
    return frequencies * (is_kept + (1 - is_kept) / rope.factor)


def _yarn(rope: RopeConfig, frequencies: np.ndarray, head_dim: int) -> np.ndarray:
    """As llama3, but interpolates linearly over channels, between those that turn beta_fast and beta_slow times."""

    def channel(turns: float) -> float:
        """The channel, not rounded, whose angle makes this many turns."""
        return head_dim * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (np.arange(head_dim // 2) - low) / ((high - low) or 0.001)
    is_kept = 1 - np.clip(ramp, 0.0, 1.0)
    return frequencies * (is_kept + (1 - is_kept) / rope.factor)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def magnitude(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


def rotation(rope: RopeConfig, head_dim: int, positions: Int[Array, "B T"]) -> tuple[Array, Array]:
    """The (cos, sin) of all angles at `positions`, each float32 [B, T, 1, H // 2], for `rotate`."""
    frequencies, factor = inverse_frequencies(rope, head_dim)
    per_channel = jnp.asarray(frequencies, jnp.float32)[None, None, None, :]
    # Angles must stay float32: in bfloat16 neighbouring positions beyond 256 would share an angle.
    angles = positions[:, :, None, None].astype(jnp.float32) * per_channel
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    x: Float[Array, "B T heads H"], cos: Float[Array, "B T 1 half"], sin: Float[Array, "B T 1 half"]
) -> Float[Array, "B T heads H"]:
    """Rotates x: channels i and i + H // 2 of every head turn together, as in the layout of Hugging Face weights."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
