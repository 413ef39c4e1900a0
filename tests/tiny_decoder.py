"""One tiny decoder and one tiny budget that the tests of decoding share, so that they share compiled programs too."""

import functools
from collections.abc import Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from random_weights import random_params

from hshare_jax.config import HShareConfig
from hshare_jax.decode_state import DecodeState, init_state
from hshare_jax.models.config import ModelConfig, RopeConfig
from hshare_jax.prefill import prefill

MODEL = ModelConfig(
    vocab_size=48, width=32, mlp_width=48, num_layers=3, num_heads=6, num_kv_heads=3, head_dim=8, max_positions=1024,
    windows=(None,) * 3, rope=RopeConfig(theta=100.0),
)  # fmt: skip
# Two of three layers copy, and a third of the lists: something is shared at every level.
HSHARE = HShareConfig(
    num_sinks=2, num_critical=6, num_recent=4, num_probes=4, refresh_interval=3,
    layer_ratio=Fraction(1, 2), head_ratio=Fraction(2, 3), label_channels=3,
)  # fmt: skip
CAPACITY = 256
# Shorter than the sinks, than sinks and recent tokens, than the budget of 12; and longer.
LENGTHS = (1, 5, 11, 60)


@functools.cache
def params(config: ModelConfig = MODEL, dtype: str = "float32") -> dict:
    """Returns the decoder's parameters."""
    return random_params(config, jnp.dtype(dtype))


def random_rows(seed: int, lengths: Sequence[int] = LENGTHS, more: int = 0) -> list[np.ndarray]:
    """Returns a row of token ids for each length, and `more` to decode."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, MODEL.vocab_size, length + more).astype(np.int32) for length in lengths]


def prefill_rows(
    rows: Sequence[np.ndarray],
    *,
    hshare: HShareConfig | None,
    config: ModelConfig = MODEL,
    capacity: int = CAPACITY,
    dtype: str = "float32",
    state: DecodeState | None = None,
) -> tuple[jax.Array, DecodeState]:
    """Returns (logits, state) after a ragged batch of prompts, on an empty state unless one is given."""
    tokens = np.full((len(rows), max(map(len, rows))), MODEL.vocab_size - 1, np.int32)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
    if state is None:
        state = init_state(config, len(rows), capacity, hshare=hshare, dtype=jnp.dtype(dtype))
    lengths = jnp.asarray([len(row) for row in rows], jnp.int32)
    return prefill(params(config, dtype), jnp.asarray(tokens), lengths, state, config=config)


def oracle_row(config: ModelConfig = MODEL) -> oracle.Row:
    """Returns an empty sequence in the float64 decoder."""
    exact = jax.tree.map(lambda array: np.asarray(array, np.float64), params(config))
    return oracle.Row(
        exact,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.windows,
        config.rope.theta,
        config.norm_eps,
    )


def oracle_budget(hshare: HShareConfig, config: ModelConfig = MODEL) -> oracle.Budget:
    """Returns the settings as plain numbers."""
    return oracle.Budget(
        hshare.num_sinks, hshare.num_critical, hshare.num_recent, hshare.num_lists(config),
        hshare.num_label_channels(config), hshare.num_probes, hshare.refresh_interval,
        hshare.num_shared_layers(config), hshare.num_shared_lists(config),
    )  # fmt: skip
