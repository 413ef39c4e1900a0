"""What the methods beside HShare share: they read sinks, a list and recent tokens, and differ in what they list."""

import dataclasses
import functools
from dataclasses import field
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from hshare_jax.errors import check_one_of, check_whole
from hshare_jax.kernels.api import dense_decode, sparse_decode
from hshare_jax.kernels.int8_rows import Rows
from hshare_jax.kernels.reads import mark_listed, take_rows
from hshare_jax.kv_cache import KVCache, replace_layer
from hshare_jax.mesh import AnyMesh, by_parts, dims, layouts_alike, num_parts
from hshare_jax.methods.base import (
    Choices,
    Method,
    PromptQueries,
    Step,
    count_dense,
    count_listed,
    identity_plan,
    mark_dense,
    mean_over_devices,
)
from hshare_jax.models.config import ModelConfig
from hshare_jax.shapes import EMPTY


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptLayer:
    """One layer right after the prefill, as a method sees it."""

    queries: Float[Array, "B P N H"] = field(metadata=dims("B P N H"))  # the queries at `probe_positions`
    last_seen: Int[Array, "B P"] = field(metadata=dims("B P"))  # the last slot that each query sees; negative for none
    # Attention that each slot received in this prefill, if the method wants it.
    received: Float[Array, "B N S"] | None = field(metadata=dims("B N S"))
    keys: Rows = field(metadata=dims("B K S"))
    lengths: Int[Array, "B"] = field(metadata=dims("B"))
    recent_start: Int[Array, "B"] = field(metadata=dims("B"))
    window: int | None = field(metadata={"static": True})
    num_lists: int = field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class StepLayer:
    """One layer of a decode step, as a method sees it."""

    q: Float[Array, "B N H"]
    k: Float[Array, "B 1 K H"]  # the newest key that the layer sees
    keys: Rows  # the newest key included
    slots: Int[Array, "B 1"]  # the newest key's slot; at or beyond the capacity for idle rows
    lengths: Int[Array, "B"]  # slots that the layer sees
    is_active: Bool[Array, "B"]
    recent_start: Int[Array, "B"]
    window: int | None
    impl: str  # which implementation appends (`kernels.api`)


@dataclasses.dataclass(frozen=True)
class ListMethod:
    """A `Method` that reads sinks, a list and recent tokens. Subclasses say what is listed and where "recent" begins.

    Lists are chosen anew on each step. With `lists_per="query_head"`, as in the published codes, the heads of a group
    choose apart. With "kv_head" they choose together, by the sum of the scores that each would choose by.

    Raises:
        SettingError: a setting outside its range.
    """

    num_sinks: int = 0  # first tokens always read
    dense_layers: int = 0  # first layers that read everything
    lists_per: Literal["kv_head", "query_head"] = "query_head"

    may_be_zero: ClassVar[tuple[str, ...]] = ()  # a subclass' whole numbers that need not be at least 1

    def __post_init__(self) -> None:
        may_be_zero = ("num_sinks", "dense_layers", *self.may_be_zero)
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.type in (int, "int") or (value is not None and item.type == int | None):
                check_whole(item.name, value, 0 if item.name in may_be_zero else 1)
        check_one_of("lists_per", self.lists_per, ("kv_head", "query_head"))

    @property
    def wants_received(self) -> bool:
        """Whether prefill must add up the attention that each slot receives."""
        return False

    @property
    def refit_interval(self) -> None:
        """None: what these methods find from a prompt serves the whole answer, as in their papers."""
        return None

    @property
    def list_size(self) -> int:
        """C, the tokens of a list; at least one place."""
        return 1

    def max_recent(self, capacity: int) -> int:
        """A bound on the length of the recent range."""
        raise NotImplementedError

    def recent_start(self, lengths: Int[Array, "B"], prompt_lengths: Int[Array, "B"]) -> Int[Array, "B"]:
        """The first slot of the recent range."""
        raise NotImplementedError

    def start_memory(self, cache: KVCache, config: ModelConfig) -> Any:
        """What the method remembers of a layer in addition to its list: a pytree."""
        return None

    def list_prompt(self, prompt: PromptLayer, memory: Any) -> tuple[Int[Array, "B J C"], Any]:
        """One layer's lists and memory after a prefill."""
        return jnp.full((prompt.lengths.shape[0], prompt.num_lists, self.list_size), EMPTY, jnp.int32), memory

    def list_step(self, step: StepLayer, lists: Int[Array, "B J C"], memory: Any) -> tuple[Int[Array, "B J C"], Any]:
        """One layer's lists, through which a step reads, and memory."""
        return lists, memory

    def check_mesh(self, config: ModelConfig, mesh: AnyMesh) -> None:
        """Nothing: every list is chosen by the heads that it serves."""

    def start(self, config: ModelConfig, cache: KVCache) -> "ListState":
        """The state of an empty cache."""
        B, L = cache.lengths.shape[0], config.num_layers
        J = config.num_kv_heads if self.lists_per == "kv_head" else config.num_heads
        return ListState(
            token_indices=jnp.full((L, B, J, self.list_size), EMPTY, jnp.int32),
            source=identity_plan(B, L, J),
            recent_start=jnp.zeros((B,), jnp.int32),
            prompt_lengths=jnp.zeros((B,), jnp.int32),
            memory=tuple(None if layer < self.dense_layers else self.start_memory(cache, config) for layer in range(L)),
            method=self,
        )

    def probe_positions(self, starts: Int[Array, "B"], lengths: Int[Array, "B"], num_tokens: int) -> Int[Array, "B P"]:
        """Positions of the prompt queries that prefill must keep; -1 for none."""
        return jnp.full((lengths.shape[0], 0), -1, jnp.int32)

    def after_prefill(
        self,
        state: "ListState",
        queries: PromptQueries,
        cache: KVCache,
        config: ModelConfig,
        *,
        memo: dict | None = None,
        impl: str = "auto",
        mesh: Mesh | None = None,
    ) -> "ListState":
        """Lists and memory of the prompts; arguments as for `Method.after_prefill`."""
        recent_start = self.recent_start(cache.lengths, cache.lengths)
        lists, memory = [], []
        for layer in range(config.num_layers):
            if layer < self.dense_layers:  # a dense layer reads everything and lists nothing
                lists.append(state.token_indices[layer])
                memory.append(state.memory[layer])
                continue
            last_seen, window = config.sees(layer, queries.positions)
            seen, _ = config.sees(layer, cache.lengths)
            prompt = PromptLayer(
                queries=queries.probes[layer],
                last_seen=last_seen,
                received=None if queries.received is None else queries.received[layer],
                keys=cache.keys[config.kv_index(layer)],
                lengths=seen,
                recent_start=recent_start,
                window=window,
                num_lists=state.source.shape[2],
            )
            new_lists, new_memory = _list_prompt(prompt, state.memory[layer], method=self, mesh=mesh)
            lists.append(new_lists)
            memory.append(new_memory)
        return dataclasses.replace(
            state,
            token_indices=jnp.stack(lists),
            recent_start=recent_start,
            prompt_lengths=jnp.copy(cache.lengths),  # a copy, because a step donates both
            memory=tuple(memory),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ListState:
    """The `MethodState` of a `ListMethod`: the lists of every layer, and what the method remembers."""

    token_indices: Array = field(metadata=dims("L B J C"))  # int32 slots, padded with EMPTY
    source: Array = field(metadata=dims("B L J", flat_ids=True))  # int32, the plan in which nothing is shared
    recent_start: Array = field(metadata=dims("B"))  # int32, first slot of the recent range
    prompt_lengths: Array = field(metadata=dims("B"))  # int32, tokens at the last prefill
    # of each layer; arrays [B, K, ...] or [B, N, ...]; None in dense layers
    memory: tuple[Any, ...] = field(metadata=dims("B K"))
    method: ListMethod = field(metadata={"static": True})

    @property
    def refresh_interval(self) -> int:
        """1, because every step chooses."""
        return 1

    def is_of(self, method: Method) -> bool:
        """Whether the method is the one that started this state."""
        return method == self.method

    def begin(self, step: Step) -> "ListState":
        """The lists with the recent range where this step reads it."""
        return dataclasses.replace(self, recent_start=self.method.recent_start(step.lengths, self.prompt_lengths))

    def attend(
        self,
        layer: int,
        q: Float[Array, "B N H"],
        k: Float[Array, "B 1 K H"] | None,
        keys: Rows,
        values: Rows,
        step: Step,
    ) -> tuple[Float[Array, "B N H"], "ListState"]:
        """Attention through the lists, and the lists and memory after this layer."""
        lengths, window = step.sees(layer)
        if layer < self.method.dense_layers:
            return dense_decode(q, keys, values, lengths, window=window, impl=step.impl), self
        slots = step.slots
        if k is None:  # the layer borrows keys; the newest key that it sees is read from the cache
            slots = jnp.where(step.is_active & (lengths > 0), lengths - 1, keys.shape[2])[:, None]
            newest = jnp.minimum(slots, keys.shape[2] - 1)[:, None]
            k = take_rows(keys, jnp.broadcast_to(newest, (slots.shape[0], keys.shape[1], 1))).swapaxes(1, 2)
        now = StepLayer(q, k, keys, slots, lengths, step.is_active, self.recent_start, window, step.impl)
        lists, memory = self.method.list_step(now, self.token_indices[layer], self.memory[layer])
        chosen = dataclasses.replace(
            self,
            token_indices=self.token_indices.at[layer].set(lists),
            memory=replace_layer(self.memory, layer, memory),
        )
        out = sparse_decode(
            q, keys, values, chosen.token_indices, self.source, layer, lengths, self.recent_start,
            num_sinks=self.method.num_sinks, max_recent=self.method.max_recent(keys.shape[2]), window=window,
            impl=step.impl,
        )  # fmt: skip
        return out, chosen

    def count_reads(self, cache: KVCache, config: ModelConfig) -> Float[Array, "B"]:
        """Tokens that the last step read, the mean over layers and heads."""
        listed = jnp.moveaxis(self.token_indices, 0, 1)
        sparse = count_listed(listed, self.recent_start, self.method.num_sinks, cache, config)
        is_dense = jnp.arange(config.num_layers)[:, None] < self.method.dense_layers
        return mean_over_devices(jnp.where(is_dense, count_dense(cache, config), sparse).mean(axis=0), config)

    def mark_reads(self, layer: int, cache: KVCache, config: ModelConfig) -> Bool[Array, "B J S"]:
        """The slots that the last step read in this layer, for each list."""
        dense = mark_dense(layer, cache.lengths, cache.capacity, config)[:, None, :]
        if layer < self.method.dense_layers:
            return dense
        return dense & mark_listed(self.token_indices[layer], self.recent_start, self.method.num_sinks, cache.capacity)

    def count_choices(self, steps: Int[np.ndarray, "B"], lengths: Int[np.ndarray, "B"], config: ModelConfig) -> Choices:
        """Zeros: these methods choose every list on every step, so the numbers would say nothing."""
        return Choices(0, 0, 0)


@functools.partial(jax.jit, static_argnames=("method", "mesh"))
def _list_prompt(
    prompt: PromptLayer, memory: Any, *, method: ListMethod, mesh: Mesh | None
) -> tuple[Int[Array, "B J C"], Any]:
    """Compiled once and called per layer; unrolling all layers would keep every layer's intermediates alive."""
    if mesh is None:
        return method.list_prompt(prompt, memory)
    prompt = dataclasses.replace(prompt, num_lists=prompt.num_lists // num_parts(mesh))
    of_memory = layouts_alike(memory, "B K")
    return by_parts(method.list_prompt, mesh, (prompt, memory), (prompt, of_memory), ("B J C", of_memory))


def sum_over_lists(x: Float[Array, "B N S"], num_lists: int) -> Float[Array, "B J S"]:
    """The sum over the heads that each list serves."""
    B, N, S = x.shape
    return x.reshape(B, num_lists, N // num_lists, S).sum(axis=2)
