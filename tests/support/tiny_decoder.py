"""One tiny decoder and one tiny budget. The tests of decoding share them, and so share compiled programs too."""

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
from hshare_jax.kernels.int8_rows import KVCacheDType
from hshare_jax.methods.base import Method
from hshare_jax.methods.hshare.method import HShare
from hshare_jax.methods.hshare.settings import HShareSettings, PlanSearch
from hshare_jax.models.config import ModelConfig, RopeConfig
from hshare_jax.prefill import prefill

MODEL = ModelConfig(
    vocab_size=48, width=32, mlp_width=48, num_layers=4, num_heads=6, num_kv_heads=3, head_dim=8, max_positions=1024,
    windows=(None,) * 4, rope=RopeConfig(theta=100.0),
)  # fmt: skip
# Five of the nine lists of the sparse layers copy. A list may copy any lower list, of the same layer or of another.
HSHARE = HShare(
    HShareSettings(
        num_sinks=2,
        num_critical=6,
        num_recent=4,
        refresh_interval=3,
        label_channels=3,
        min_length=0,
        dense_layers=1,
        tail=None,
        tail_rank=0,
    ),
    PlanSearch(num_probes=4, layer_ratio=Fraction(3, 4), head_ratio=Fraction(2, 3)),
)


def vary(method: HShare, **changes: object) -> HShare:
    """The method with other settings, given by name."""
    return method.with_settings(changes)


# The same with tails. Their fit takes long to compile, so only tests that are about tails have them.
TAILED = vary(HSHARE, tail="fitted")
# The method as published, at the same sizes.
PUBLISHED = vary(
    HShare.paper(), num_sinks=2, num_critical=6, num_recent=4, refresh_interval=3,
    layer_ratio=Fraction(3, 4), head_ratio=Fraction(2, 3), label_channels=3,
)  # fmt: skip
# Layers 1 and 3 read the keys and values of layer 2: layer 1 looks up, layer 3 looks down. Both have windows.
SHARED_KV = dataclasses.replace(
    MODEL, kv_layer_map=(0, 2, 2, 2), windows=(None, 20, None, 9), forward_passes=None
)  # fmt: skip
# Queries and keys have norms, as in Qwen3. Layers 1 to 3 rotate nothing, because layer 2 does not, as in SmolLM3.
NORMED = dataclasses.replace(SHARED_KV, qk_norm=True, no_rope_layers=(2,))
CAPACITY = 256
# A row shorter than the sinks, one shorter than sinks and recent tokens, one shorter than the budget of 12, a long one.
LENGTHS = (1, 5, 11, 60)


@functools.cache
def params(config: ModelConfig = MODEL, dtype: str = "float32") -> dict:
    """The decoder's parameters."""
    return random_params(config, jnp.dtype(dtype))


def random_rows(seed: int, lengths: Sequence[int] = LENGTHS, more: int = 0) -> list[np.ndarray]:
    """A row of random token ids for each length, with `more` further tokens to decode."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, MODEL.vocab_size, length + more).astype(np.int32) for length in lengths]


def prefill_rows(
    rows: Sequence[np.ndarray],
    *,
    method: Method | None,
    config: ModelConfig = MODEL,
    capacity: int = CAPACITY,
    dtype: str = "float32",
    kv_cache_dtype: KVCacheDType = "auto",
    state: DecodeState | None = None,
) -> tuple[jax.Array, DecodeState]:
    """The logits and the state after a ragged batch of prompts. The state is empty before, unless one is given."""
    tokens = np.full((len(rows), max(map(len, rows))), MODEL.vocab_size - 1, np.int32)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
    if state is None:
        how = {"dtype": jnp.dtype(dtype), "kv_cache_dtype": kv_cache_dtype}
        state = init_state(config, len(rows), capacity, method=method, **how)
    lengths = jnp.asarray([len(row) for row in rows], jnp.int32)
    return prefill(params(config, dtype), jnp.asarray(tokens), lengths, state, config=config, method=method)


def oracle_row(config: ModelConfig = MODEL) -> row_oracle.Row:
    """An empty sequence in the float64 decoder."""
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
        config.no_rope_layers,
    )


def oracle_budget(method: HShare, config: ModelConfig = MODEL) -> oracle.Budget:
    """The settings of a method as plain numbers."""
    settings, search = method.settings, method.search
    return oracle.Budget(
        num_sinks=settings.num_sinks,
        num_critical=settings.num_critical,
        num_recent=settings.num_recent,
        num_lists=config.num_kv_heads if settings.lists_per == "kv_head" else config.num_heads,
        num_channels=settings.num_label_channels(config),
        bits=settings.label_bits,
        is_exact=settings.scoring == "exact",
        num_probes=None if search.num_probes == "all" else search.num_probes,
        interval=settings.refresh_interval,
        is_dilated=settings.dilate,
        ratio=settings.budget_ratio,
        dense_layers=settings.num_dense,
        min_length=settings.dense_below,
        plan=search.plan_kind,
        layer_ratio=search.layer_ratio,
        head_ratio=search.head_ratio,
        tail=settings.tail is not None,
        tail_rank=settings.tail_rank,
        pool=settings.pool,
    )


def oracle_rows(
    rows: Sequence[np.ndarray], method: HShare, config: ModelConfig = MODEL, **changes: object
) -> list[row_oracle.SharedRow]:
    """The rows in the float64 decoder after their prompts. `changes` replace fields of the oracle's budget."""
    budget = dataclasses.replace(oracle_budget(method, config), **changes)  # pyright: ignore[reportArgumentType]
    found = [row_oracle.SharedRow(oracle_row(config), budget) for _ in rows]
    for shared_row, tokens in zip(found, rows, strict=True):
        shared_row.prefill(tokens)
    if method.search.plan_scope == "batch":
        row_oracle.share_batch_plan(found)
    return found
