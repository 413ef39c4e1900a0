"""What the methods of this folder share: all read sinks, a list and recent tokens; they differ in what is listed."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from hshare_jax.kernels.api import dense_decode, sparse_decode
from hshare_jax.kv_cache import KVCache
from hshare_jax.methods.base import PromptQueries, Step, count_dense, count_listed, mark_dense, mark_listed
from hshare_jax.methods.hshare.settings import check_whole
from hshare_jax.methods.hshare.share_plan import identity_plan
from hshare_jax.models.config import ModelConfig
from hshare_jax.shapes import EMPTY


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptLayer:
    """One layer right after the prefill, as a method sees it."""

    queries: Float[Array, "B P N H"]  # those that were asked for
    last_seen: Int[Array, "B P"]  # the last slot that each sees; negative for none
    received: Float[Array, "B N S"] | None  # attention that each slot got from this prefill's queries, if asked for
    keys: Float[Array, "B K S H"]
    lengths: Int[Array, "B"]
    recent_start: Int[Array, "B"]
    window: int | None = dataclasses.field(metadata={"static": True})
    num_lists: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class StepLayer:
    """One layer of a decode step, as a method sees it."""

    q: Float[Array, "B N H"]
    k: Float[Array, "B 1 K H"]  # the newest key that the layer sees
    keys: Float[Array, "B K S H"]  # the newest key included
    slots: Int[Array, "B 1"]  # where it lies; at or beyond the capacity for idle rows
    lengths: Int[Array, "B"]  # slots that the layer sees
    is_active: Bool[Array, "B"]
    recent_start: Int[Array, "B"]
    window: int | None


@dataclasses.dataclass(frozen=True)
class ListMethod:
    """Settings that all share, and what a method may define; it must at least say when the recent range starts.

    Lists are chosen anew on each step. With `lists_per="query_head"`, as the published codes have it, heads of a group
    choose apart; with "kv_head" they choose together, by the sum of what each would choose by.
    """

    num_sinks: int = 0  # first tokens always read
    dense_layers: int = 0  # the first layers read everything
    lists_per: Literal["kv_head", "query_head"] = "query_head"

    def __post_init__(self) -> None:
        may_be_zero = ("num_sinks", "dense_layers", "num_pages")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, "int") or (value is not None and field.type == int | None):
                check_whole(field.name, value, 0 if field.name in may_be_zero else 1)
        if self.lists_per not in ("kv_head", "query_head"):
            raise ValueError(f"lists_per={self.lists_per!r} must be one of 'kv_head', 'query_head'")

    wants_received = False  # whether prefill is to add up the attention that each slot receives

    @property
    def list_size(self) -> int:
        """Returns C, the tokens of a list; at least one place."""
        return 1

    def max_recent(self, capacity: int) -> int:
        """Returns a bound on the recent range."""
        raise NotImplementedError

    def recent_start(self, lengths: Int[Array, "B"], prompt_lengths: Int[Array, "B"]) -> Int[Array, "B"]:
        """Returns where the recent range starts."""
        raise NotImplementedError

    def probe_positions(self, starts: Int[Array, "B"], lengths: Int[Array, "B"]) -> Int[Array, "B P"]:
        """Returns where the prompt queries stand that are to be kept; -1 for none."""
        return jnp.full((lengths.shape[0], 0), -1, jnp.int32)

    def start_memory(self, cache: KVCache, model: ModelConfig) -> Any:
        """Returns what the method remembers of a layer beside its list."""
        return None

    def list_prompt(self, prompt: PromptLayer, memory: Any) -> tuple[Int[Array, "B J C"], Any]:
        """Returns (the lists, the memory) after a prefill."""
        return jnp.full((prompt.lengths.shape[0], prompt.num_lists, self.list_size), EMPTY, jnp.int32), memory

    def list_step(self, step: StepLayer, lists: Int[Array, "B J C"], memory: Any) -> tuple[Int[Array, "B J C"], Any]:
        """Returns (the lists, the memory) that a step reads through."""
        return lists, memory

    def start(self, model: ModelConfig, cache: KVCache) -> "Listed":
        """Returns the state of an empty cache."""
        B, L = cache.lengths.shape[0], model.num_layers
        J = model.num_kv_heads if self.lists_per == "kv_head" else model.num_heads
        return Listed(
            token_indices=jnp.full((L, B, J, self.list_size), EMPTY, jnp.int32),
            source=identity_plan(B, L, J),
            recent_start=jnp.zeros((B,), jnp.int32),
            prompt_lengths=jnp.zeros((B,), jnp.int32),
            memory=tuple(self.start_memory(cache, model) for _ in range(L)),
            method=self,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Listed:
    """The lists of every layer and what their method remembers: a `MethodState`."""

    token_indices: Array  # [L, B, J, C] int32 slots, padded with EMPTY
    source: Array  # [B, L, J] int32, the plan in which nothing is shared
    recent_start: Array  # [B] int32, first slot of the recent range
    prompt_lengths: Array  # [B] int32, tokens at the last prefill
    memory: tuple[Any, ...]  # of each layer
    method: ListMethod = dataclasses.field(metadata={"static": True})

    @property
    def refresh_interval(self) -> int:
        """Returns 1: every step chooses."""
        return 1

    @property
    def wants_received(self) -> bool:
        """Returns whether prefill must add up the attention that each slot receives."""
        return self.method.wants_received

    def probe_positions(self, starts: Int[Array, "B"], lengths: Int[Array, "B"], num_tokens: int) -> Int[Array, "B P"]:
        """Returns where the prompt queries stand that are to be kept; -1 for none."""
        return self.method.probe_positions(starts, lengths)

    def after_prefill(
        self, queries: PromptQueries, positions: Int[Array, "B P"], cache: KVCache, model: ModelConfig
    ) -> "Listed":
        """Returns lists and memory as the prompts have them."""
        lengths, lists, memory = cache.lengths, [], []
        recent_start = self.method.recent_start(lengths, lengths)
        for layer in range(model.num_layers):
            last_seen, window = model.sees(layer, positions)
            seen, _ = model.sees(layer, lengths)
            prompt = PromptLayer(
                queries=queries.probes[layer],
                last_seen=last_seen,
                received=None if queries.received is None else queries.received[layer],
                keys=cache.keys[model.kv_index(layer)],
                lengths=seen,
                recent_start=recent_start,
                window=window,
                num_lists=self.source.shape[2],
            )
            if layer < self.method.dense_layers:  # which read everything
                lists.append(self.token_indices[layer])
                memory.append(self.memory[layer])
                continue
            found = _list_prompt(prompt, self.memory[layer], method=self.method)
            lists.append(found[0])
            memory.append(found[1])
        return dataclasses.replace(
            self, token_indices=jnp.stack(lists), recent_start=recent_start, memory=tuple(memory),
            prompt_lengths=jnp.copy(lengths),  # not the cache's own: a step donates both
        )  # fmt: skip

    def begin(self, step: Step) -> "Listed":
        """Returns these lists with the recent range where this step reads it."""
        return dataclasses.replace(self, recent_start=self.method.recent_start(step.lengths, self.prompt_lengths))

    def attend(
        self,
        layer: int,
        q: Float[Array, "B N H"],
        k: Float[Array, "B 1 K H"] | None,
        keys: Array,
        values: Array,
        step: Step,
    ) -> tuple[Float[Array, "B N H"], "Listed"]:
        """Returns (attention through the lists, the lists and memory after this step)."""
        lengths, window = step.sees(layer)
        if layer < self.method.dense_layers:
            return dense_decode(q, keys, values, lengths, window=window, impl=step.impl), self
        slots = step.slots
        if k is None:  # the newest key that the layer sees is another's
            slots = jnp.where(step.is_active & (lengths > 0), lengths - 1, keys.shape[2])[:, None]
            k = jnp.take_along_axis(keys, slots[:, None, :, None], axis=2, mode="clip").swapaxes(1, 2)
        now = StepLayer(q, k, keys, slots, lengths, step.is_active, self.recent_start, window)
        lists, memory = self.method.list_step(now, self.token_indices[layer], self.memory[layer])
        chosen = dataclasses.replace(
            self,
            token_indices=self.token_indices.at[layer].set(lists),
            memory=(*self.memory[:layer], memory, *self.memory[layer + 1 :]),
        )
        out = sparse_decode(
            q, keys, values, chosen.token_indices, self.source, layer, lengths, self.recent_start,
            num_sinks=self.method.num_sinks, max_recent=self.method.max_recent(keys.shape[2]), window=window,
            impl=step.impl,
        )  # fmt: skip
        return out, chosen

    def count_reads(self, cache: KVCache, model: ModelConfig) -> Float[Array, "B"]:
        """Returns the tokens that the last step read, the mean over layers and heads."""
        listed = jnp.moveaxis(self.token_indices, 0, 1)
        sparse = count_listed(listed, self.recent_start, self.method.num_sinks, cache, model)
        is_dense = jnp.arange(model.num_layers)[:, None] < self.method.dense_layers
        return jnp.where(is_dense, count_dense(cache, model), sparse).mean(axis=0)

    def mark_reads(self, layer: int, cache: KVCache, model: ModelConfig) -> Bool[Array, "B J S"]:
        """Returns the slots that the last step read in this layer, by list."""
        dense = mark_dense(layer, cache.lengths, cache.capacity, model)[:, None, :]
        if layer < self.method.dense_layers:
            return dense
        return dense & mark_listed(self.token_indices[layer], self.recent_start, self.method.num_sinks, cache.capacity)


@functools.partial(jax.jit, static_argnames=("method",))
def _list_prompt(prompt: PromptLayer, memory: Any, *, method: ListMethod) -> tuple[Int[Array, "B J C"], Any]:
    """Returns what the method finds; a program for all layers, since one of them all holds what each writes."""
    return method.list_prompt(prompt, memory)


def sum_over_lists(x: Float[Array, "B N S"], num_lists: int) -> Float[Array, "B J S"]:
    """Returns the sum over the heads that each list serves."""
    B, N, S = x.shape
    return x.reshape(B, num_lists, N // num_lists, S).sum(axis=2)
