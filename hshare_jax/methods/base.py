"""What every sparse method is to the decoder: what it asks of a prompt, and how a step reads the cache.

HShare's `SharedLists` is one, `selectors/` holds the others. A model, the prefill, the decode step and the loops around
them know only this.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from hshare_jax.kv_cache import KVCache
from hshare_jax.models.config import ModelConfig
from hshare_jax.shapes import EMPTY


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptQueries:
    """What is kept of a prompt's rotated queries until a method has made of them what it needs."""

    probes: tuple[Array, ...]  # L x [B, P, N, H], zero where a row lacks a probe
    sizes: tuple[
        Array, ...
    ]  # KV layers x [B, N, H] float32, the sum of |q| over the prompt and all that read these keys
    received: tuple[Array, ...] | None  # L x [B, N, S] float32, the attention each slot got from all of the prompt


@dataclasses.dataclass(frozen=True)
class Step:
    """One decode step, as a method's attention is told of it."""

    model: ModelConfig
    slots: Int[Array, "B 1"]  # where each row's new token is written; at or beyond the capacity for idle rows
    lengths: Int[Array, "B"]  # tokens of each row, the new one included
    is_active: Bool[Array, "B"]  # rows that take part
    refresh: bool | None  # whether rows choose anew on this step; None leaves it to each row's age
    impl: str  # what computes it (`kernels.api`)

    def sees(self, layer: int) -> tuple[Int[Array, "B"], int | None]:
        """Returns (how many tokens of each row a layer sees, its window); one that looks up sees the earlier ones."""
        return _seen(self.model, layer, self.lengths)


@runtime_checkable
class MethodState(Protocol):
    """What a sparse method carries from step to step: a pytree."""

    @property
    def refresh_interval(self) -> int:
        """Returns how many decode steps one choice serves."""
        ...

    @property
    def wants_received(self) -> bool:
        """Returns whether prefill must add up the attention that each slot receives."""
        ...

    def probe_positions(self, starts: Int[Array, "B"], lengths: Int[Array, "B"], num_tokens: int) -> Int[Array, "B P"]:
        """Returns where the prompt queries stand that are to be kept; -1 for none.

        Args:
            starts: tokens that each row held before this prefill.
            lengths: tokens that it will hold after it.
            num_tokens: T, the padded width of this prefill.
        """
        ...

    def after_prefill(
        self, queries: PromptQueries, positions: Int[Array, "B P"], cache: KVCache, model: ModelConfig
    ) -> "MethodState":
        """Returns what decoding starts from, found from the prompts."""
        ...

    def begin(self, step: Step) -> "MethodState":
        """Returns what all layers of a step read through."""
        ...

    def attend(
        self,
        layer: int,
        q: Float[Array, "B N H"],
        k: Float[Array, "B 1 K H"] | None,
        keys: Array,
        values: Array,
        step: Step,
    ) -> tuple[Float[Array, "B N H"], "MethodState"]:
        """Returns (one layer's attention, the next state); what it reads of the rows is `ModelConfig.sees`.

        The cache [B, K, S, H] that serves the layer holds the new token already, unless the layer looks up. k is the
        new key where the layer's own is used.
        """
        ...

    def count_reads(self, cache: KVCache, model: ModelConfig) -> Float[Array, "B"]:
        """Returns the tokens that the last step read, the mean over layers and heads."""
        ...

    def mark_reads(self, layer: int, cache: KVCache, model: ModelConfig) -> Bool[Array, "B J S"]:
        """Returns the slots that the last step read in this layer, by list: one for each kv or query head."""
        ...


@runtime_checkable
class Method(Protocol):
    """The settings of a sparse method: static and hashable."""

    def start(self, model: ModelConfig, cache: KVCache) -> MethodState:
        """Returns the state of an empty cache."""
        ...


def _seen(model: ModelConfig, layer: int, lengths: Int[Array, "B"]) -> tuple[Int[Array, "B"], int | None]:
    ends, window = model.sees(layer, lengths)
    return jnp.maximum(ends, 0) if model.looks_up(layer) else ends, window  # a row may be empty


def count_dense(cache: KVCache, model: ModelConfig) -> Int[Array, "L B"]:
    """Returns the tokens that dense attention reads in each layer: all, or those in its window."""
    seen = (_seen(model, layer, cache.lengths) for layer in range(model.num_layers))
    return jnp.stack([lengths if window is None else jnp.minimum(lengths, window) for lengths, window in seen])


def mark_dense(layer: int, lengths: Int[Array, "B"], num_slots: int, model: ModelConfig) -> Bool[Array, "B S"]:
    """Returns the slots that dense attention reads in a layer."""
    lengths, window = model.sees(layer, lengths)
    slots = jnp.arange(num_slots)[None, :]
    is_read = slots < lengths[:, None]
    return is_read if window is None else is_read & (slots >= lengths[:, None] - window)


def count_listed(
    listed: Int[Array, "B L J C"],
    recent_start: Int[Array, "B"],
    num_sinks: int,
    cache: KVCache,
    model: ModelConfig,
) -> Float[Array, "L B"]:
    """Returns the tokens read through these lists, the sinks and the recent range, the mean over a layer's lists."""
    seen = [_seen(model, layer, cache.lengths) for layer in range(model.num_layers)]
    lengths = jnp.stack([ends for ends, _ in seen])
    windows = jnp.asarray([cache.capacity if window is None else window for _, window in seen], jnp.int32)
    first = jnp.maximum(lengths - windows[:, None], 0)
    start = jnp.minimum(jnp.maximum(recent_start[None, :], first), lengths)
    sinks = jnp.maximum(jnp.minimum(num_sinks, recent_start)[None, :] - first, 0)
    is_read = (listed != EMPTY) & (listed >= first.T[:, :, None, None])
    critical = is_read.sum(axis=-1, dtype=jnp.int32).mean(axis=-1, dtype=jnp.float32).T
    return sinks + critical + lengths - start


def mark_listed(
    listed: Int[Array, "B J C"], recent_start: Int[Array, "B"], num_sinks: int, capacity: int
) -> Bool[Array, "B J S"]:
    """Returns the slots of these lists, the sinks and the recent range."""
    B, J, _ = listed.shape
    slots, start = jnp.arange(capacity)[None, :], recent_start[:, None]
    is_ranged = (slots < jnp.minimum(num_sinks, start)) | (slots >= start)
    rows, lists = jnp.arange(B)[:, None, None], jnp.arange(J)[None, :, None]
    marks = jnp.broadcast_to(is_ranged[:, None, :], (B, J, capacity))
    return marks.at[rows, lists, jnp.where(listed == EMPTY, capacity, listed)].set(True, mode="drop")
