"""One tiny decoder and one tiny budget that the tests of decoding share, so that they share compiled programs too."""

import dataclasses
import functools
from collections.abc import Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import row_oracle
from random_weights import random_params

from hshare_jax.decode_state import DecodeState, init_state
from hshare_jax.methods.base import Method
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.models.config import ModelConfig, RopeConfig
from hshare_jax.prefill import prefill

MODEL = ModelConfig(
    vocab_size=48, width=32, mlp_width=48, num_layers=4, num_heads=6, num_kv_heads=3, head_dim=8, max_positions=1024,
    windows=(None,) * 4, rope=RopeConfig(theta=100.0),
)  # fmt: skip
# Five of the nine lists of the sparse layers copy: any layer's and within any layer.
HSHARE = HShareSettings(
    num_sinks=2, num_critical=6, num_recent=4, num_probes=4, refresh_interval=3,
    layer_ratio=Fraction(3, 4), head_ratio=Fraction(2, 3), label_channels=3,
)  # fmt: skip
# The method as published, at the same sizes.
PUBLISHED = dataclasses.replace(
    HShareSettings.published(), num_sinks=2, num_critical=6, num_recent=4, refresh_interval=3,
    layer_ratio=Fraction(3, 4), head_ratio=Fraction(2, 3), label_channels=3,
)  # fmt: skip
# Layer 1 looks up at layer 2's keys and values, layer 3 down at them, all under windows.
SHARED_KV = dataclasses.replace(
    MODEL, kv_layer_map=(0, 2, 2, 2), windows=(None, 20, None, 9), forward_passes=None
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
    hshare: HShareSettings | Method | None,
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
        state = init_state(config, len(rows), capacity, method=hshare, dtype=jnp.dtype(dtype))
    lengths = jnp.asarray([len(row) for row in rows], jnp.int32)
    return prefill(params(config, dtype), jnp.asarray(tokens), lengths, state, config=config)


def oracle_row(config: ModelConfig = MODEL) -> row_oracle.Row:
    """Returns an empty sequence in the float64 decoder."""
    exact = jax.tree.map(lambda array: np.asarray(array, np.float64), params(config))
    return row_oracle.Row(
        exact,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.windows,
        config.rope.theta,
        config.norm_eps,
        tuple(map(config.kv_layer, range(config.num_layers))),
    )


def oracle_budget(hshare: HShareSettings, config: ModelConfig = MODEL) -> oracle.Budget:
    """Returns the settings as plain numbers."""
    return oracle.Budget(
        num_sinks=hshare.num_sinks,
        num_critical=hshare.num_critical,
        num_recent=hshare.num_recent,
        num_lists=config.num_kv_heads if hshare.lists_per == "kv_head" else config.num_heads,
        num_channels=hshare.num_label_channels(config),
        bits=hshare.label_bits,
        is_exact=hshare.scoring == "exact",
        num_probes=None if hshare.num_probes == "all" else hshare.num_probes,
        interval=hshare.refresh_interval,
        is_dilated=hshare.dilate,
        ratio=hshare.budget_ratio,
        dense_layers=hshare.dense_layers,
        min_length=hshare.min_length,
        plan=hshare.plan,
        layer_ratio=hshare.layer_ratio,
        head_ratio=hshare.head_ratio,
    )


def oracle_rows(
    rows: Sequence[np.ndarray], hshare: HShareSettings, config: ModelConfig = MODEL, **changes: object
) -> list[row_oracle.SharedRow]:
    """Returns the rows in the float64 decoder after their prompts; `changes` are of its budget."""
    budget = dataclasses.replace(oracle_budget(hshare, config), **changes)  # pyright: ignore[reportArgumentType]
    found = [row_oracle.SharedRow(oracle_row(config), budget) for _ in rows]
    for shared_row, tokens in zip(found, rows, strict=True):
        shared_row.prefill(tokens)
    if hshare.plan_scope == "batch":
        row_oracle.share_batch_plan(found)
    return found
