"""The interface of every sparse method: what it asks of a prompt, and how a decode step reads the cache through it.

A method is a static value (`Method`). It starts a pytree that the decode loop carries from step to step
(`MethodState`). Prefill, decode step, decode loop and generation know only these two.
"""

import dataclasses
from dataclasses import field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from hshare_jax.kernels.int8_rows import Rows
from hshare_jax.kv_cache import KVCache
from hshare_jax.mesh import AnyMesh, dims
from hshare_jax.models.config import ModelConfig
from hshare_jax.shapes import EMPTY, MODEL, Source


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptQueries:
    """The rotated queries of a prompt that prefill keeps until a method has found from them what it needs."""

    # int32, where the probes stand; -1, or the capacity, where a row has none
    positions: Array = field(metadata=dims("B P"))
    probes: tuple[Array, ...] = field(metadata=dims("B P N H"))  # one for each layer; zero where a row lacks a probe
    # One for each KV layer, float32: the sum of |q| over the prompt and over all layers that read these keys.
    sizes: tuple[Array, ...] = field(metadata=dims("B N H"))
    # One for each layer, float32: the attention that each slot received from the whole prompt.
    received: tuple[Array, ...] | None = field(metadata=dims("B N S"))


@dataclasses.dataclass(frozen=True)
class Step:
    """One decode step, as a method sees it."""

    config: ModelConfig
    slots: Int[Array, "B 1"]  # where each row's new token is written; at or beyond the capacity for idle rows
    lengths: Int[Array, "B"]  # tokens of each row, the new token included
    is_active: Bool[Array, "B"]  # rows that take part
    refresh: bool | None  # whether rows choose anew on this step; None leaves it to each row's age
    impl: str  # which implementation computes the step (`kernels.api`)

    def sees(self, layer: int) -> tuple[Int[Array, "B"], int | None]:
        """How many tokens of each row a layer sees, and the layer's window. A layer that looks up sees one less."""
        return _seen(self.config, layer, self.lengths)


class Choices(NamedTuple):
    """How often critical tokens were chosen, counted over all rows."""

    refreshes: int  # steps of a row that chose lists anew
    selections: int  # lists that were chosen
    possible: int  # lists that would be chosen if every list of every sparse layer were chosen on each step


@runtime_checkable
class MethodState(Protocol):
    """What a sparse method carries from step to step: a pytree."""

    @property
    def refresh_interval(self) -> int:
        """Decode steps that one choice serves."""
        ...

    def begin(self, step: Step) -> "MethodState":
        """The state at the beginning of a step, before the first layer attends."""
        ...

    def attend(
        self,
        layer: int,
        q: Float[Array, "B N H"],
        k: Float[Array, "B 1 K H"] | None,
        keys: Rows,
        values: Rows,
        step: Step,
    ) -> tuple[Float[Array, "B N H"], "MethodState"]:
        """One layer's attention, and the next state.

        Args:
            layer: the layer.
            q: the new queries.
            k: the new key as it is cached, or None for a layer that borrows keys and values.
            keys, values: the cache that serves the layer [B, K, S, H]. The new token is in it, unless the layer looks
                up; `Step.sees` tells what the layer may read.
            step: the step.
        """
        ...

    def is_of(self, method: "Method") -> bool:
        """Whether `method` may prefill onto this state: it is the one that started it, but for how a plan is found."""
        ...

    def count_reads(self, cache: KVCache, config: ModelConfig) -> Float[Array, "B"]:
        """Tokens that the last step read, the mean over layers and heads."""
        ...

    def mark_reads(self, layer: int, cache: KVCache, config: ModelConfig) -> Bool[Array, "B J S"]:
        """The slots that the last step read in a layer, for each list: one list for each kv or query head."""
        ...

    def count_choices(self, steps: Int[np.ndarray, "B"], lengths: Int[np.ndarray, "B"], config: ModelConfig) -> Choices:
        """How often tokens were chosen since the last prefill or refit.

        Args:
            steps: decode steps that each row has made since.
            lengths: tokens of each row now.
            config: the model.
        """
        ...


@runtime_checkable
class Method(Protocol):
    """A way to decode sparsely: settings, and what was found beforehand. Static and hashable."""

    @property
    def wants_received(self) -> bool:
        """Whether prefill must add up the attention that each slot receives."""
        ...

    @property
    def refit_interval(self) -> int | None:
        """Decode steps after which `refit` finds anew what was found from the prompt; None for never.

        A multiple of the state's `refresh_interval`.
        """
        ...

    def check_mesh(self, config: ModelConfig, mesh: AnyMesh) -> None:
        """Raises ValueError if the method cannot serve heads and rows on different devices of this mesh."""
        ...

    def start(self, config: ModelConfig, cache: KVCache) -> MethodState:
        """The state that belongs to an empty cache.

        Raises:
            ValueError: the method does not fit the model.
        """
        ...

    def probe_positions(self, starts: Int[Array, "B"], lengths: Int[Array, "B"], num_tokens: int) -> Int[Array, "B P"]:
        """Positions of the prompt queries that prefill must keep; -1 for none.

        Args:
            starts: tokens that each row held before this prefill.
            lengths: tokens that each row will hold after this prefill.
            num_tokens: T, the padded width of this prefill.
        """
        ...

    def after_prefill(
        self,
        state: Any,
        queries: PromptQueries,
        cache: KVCache,
        config: ModelConfig,
        *,
        memo: dict | None = None,
        impl: str = "auto",
        mesh: Mesh | None = None,
    ) -> MethodState:
        """The state that decoding starts from, found from the prompts.

        Args:
            state: from `start`, or from decode steps before this prefill.
            queries: the queries at `probe_positions`.
            cache: with the prompts in it.
            config: the model.
            memo: a dict that a caller keeps while it starts several methods on the same prompts. A method may store
                results there that a variant of the method can use again. None stores nothing.
            impl: which implementation computes selection and attention, as `kernels.api` describes it.
            mesh: the devices that hold the arrays in parts; None for one device.
        """
        ...


def _seen(config: ModelConfig, layer: int, lengths: Int[Array, "B"]) -> tuple[Int[Array, "B"], int | None]:
    ends, window = config.sees(layer, lengths)
    return jnp.maximum(ends, 0) if config.looks_up(layer) else ends, window  # a row may be empty


def identity_plan(batch_size: int, num_layers: int, num_lists: int) -> Source:
    """The plan in which nothing is shared."""
    flat = jnp.arange(num_layers * num_lists, dtype=jnp.int32).reshape(1, num_layers, num_lists)
    return jnp.tile(flat, (batch_size, 1, 1))


def mean_over_devices(of_heads: Float[Array, "B"], config: ModelConfig) -> Float[Array, "B"]:
    """The mean over all heads, from the mean over the heads of one device. All devices have as many heads."""
    return lax.pmean(of_heads, MODEL) if config.is_part else of_heads


def count_dense(cache: KVCache, config: ModelConfig) -> Int[Array, "L B"]:
    """Tokens that dense attention reads in each layer: all of a row, or those inside the layer's window."""
    seen = (_seen(config, layer, cache.lengths) for layer in range(config.num_layers))
    return jnp.stack([lengths if window is None else jnp.minimum(lengths, window) for lengths, window in seen])


def mark_dense(layer: int, lengths: Int[Array, "B"], num_slots: int, config: ModelConfig) -> Bool[Array, "B S"]:
    """The slots that dense attention reads in a layer."""
    lengths, window = config.sees(layer, lengths)
    slots = jnp.arange(num_slots)[None, :]
    is_read = slots < lengths[:, None]
    return is_read if window is None else is_read & (slots >= lengths[:, None] - window)


def count_listed(
    listed: Int[Array, "B L J C"],
    recent_start: Int[Array, "B"],
    num_sinks: int,
    cache: KVCache,
    config: ModelConfig,
) -> Float[Array, "L B"]:
    """Tokens read in each layer, the sum of sinks, recent range and list: the mean over the layer's lists."""
    seen = [_seen(config, layer, cache.lengths) for layer in range(config.num_layers)]
    lengths = jnp.stack([ends for ends, _ in seen])
    windows = jnp.asarray([cache.capacity if window is None else window for _, window in seen], jnp.int32)
    first = jnp.maximum(lengths - windows[:, None], 0)
    start = jnp.minimum(jnp.maximum(recent_start[None, :], first), lengths)
    sinks = jnp.maximum(jnp.minimum(num_sinks, recent_start)[None, :] - first, 0)
    is_read = (listed != EMPTY) & (listed >= first.T[:, :, None, None])
    critical = is_read.sum(axis=-1, dtype=jnp.int32).mean(axis=-1, dtype=jnp.float32).T
    return sinks + critical + lengths - start
