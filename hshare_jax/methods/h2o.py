"""H2O: the tokens that received most attention so far, and the last tokens (Zhang et al., 2023, arXiv 2306.14048)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from hshare_jax.kernels.reads import slots_to_read, weights_of_reads
from hshare_jax.kernels.top_k import select_tokens
from hshare_jax.kv_cache import KVCache
from hshare_jax.methods.listed import ListMethod, PromptLayer, StepLayer, sum_over_lists
from hshare_jax.models.config import ModelConfig
from hshare_jax.shapes import EMPTY


@dataclasses.dataclass(frozen=True)
class H2O(ListMethod):
    """Reads `num_heavy` heavy hitters and the `num_recent` last tokens (Algorithm 1). A dropped token never comes back.

    Each token adds up the attention that it receives: from all queries of the prompt, and then from every step that
    reads it. On each step the token that leaves the recent range competes with the list. The token with the smallest
    sum is dropped; on ties the oldest. The paper gives half of the budget to either part.
    """

    num_heavy: int = 512
    num_recent: int = 512

    @property
    def wants_received(self) -> bool:
        """True: the prompt's heavy hitters are found from the attention that each slot receives."""
        return True

    @property
    def list_size(self) -> int:
        """The heavy hitters of a list."""
        return self.num_heavy

    def max_recent(self, capacity: int) -> int:
        """A bound on the length of the recent range."""
        return self.num_recent

    def recent_start(self, lengths: Int[Array, "B"], prompt_lengths: Int[Array, "B"]) -> Int[Array, "B"]:
        """The first slot of the recent range."""
        return jnp.maximum(lengths - self.num_recent, 0)

    def start_memory(self, cache: KVCache, config: ModelConfig) -> Float[Array, "B N S"]:
        """The attention that each slot has received: none yet."""
        return jnp.zeros((cache.lengths.shape[0], config.num_heads, cache.capacity), jnp.float32)

    def list_prompt(
        self, prompt: PromptLayer, memory: Float[Array, "B N S"]
    ) -> tuple[Int[Array, "B J C"], Float[Array, "B N S"]]:
        """The heavy hitters of the prompt, and the attention that each slot received."""
        assert prompt.received is not None
        memory = memory + prompt.received
        slots = jnp.arange(memory.shape[2])[None, :]
        is_candidate = (slots >= self.num_sinks) & (slots < prompt.recent_start[:, None])
        if prompt.window is not None:
            is_candidate &= slots >= prompt.lengths[:, None] - prompt.window
        return select_tokens(sum_over_lists(memory, prompt.num_lists), is_candidate, self.num_heavy), memory

    def list_step(self, step: StepLayer, lists: Int[Array, "B J C"], memory: Any) -> tuple[Int[Array, "B J C"], Any]:
        """The lists after the token that left the recent range has competed, and the attention with this step's."""
        B, J, C = lists.shape
        leaving = step.recent_start - 1
        is_leaving = step.is_active & (leaving >= self.num_sinks)
        entries = jnp.concatenate([lists, jnp.broadcast_to(leaving[:, None, None], (B, J, 1))], axis=2)
        received = sum_over_lists(memory, J)
        sums = jnp.take_along_axis(received, jnp.maximum(entries, 0), axis=2)
        if step.window is not None:  # tokens that no later query sees go first
            sums = jnp.where(entries < (step.lengths - step.window)[:, None, None], -jnp.inf, sums)
        # A full list drops its smallest sum, and later entries move up, so that the list stays ascending.
        is_filled = lists != EMPTY
        least = jnp.argmin(sums, axis=2)
        number = is_filled.sum(axis=2)
        place = jnp.arange(C)[None, None, :]
        moved = jnp.where(place >= least[:, :, None], entries[:, :, 1:], entries[:, :, :-1])
        filled = jnp.where(place == number[:, :, None], leaving[:, None, None], lists)
        new = jnp.where((number == C)[:, :, None], moved, filled)
        lists = jnp.where(is_leaving[:, None, None], new, lists)
        slots = slots_to_read(
            lists, step.lengths, step.recent_start,
            num_sinks=self.num_sinks, max_recent=self.num_recent, window=step.window,
        )  # fmt: skip
        weights = weights_of_reads(step.q, step.keys, slots)
        N, S = memory.shape[1:]
        index = jnp.repeat(jnp.where((slots == EMPTY) | ~step.is_active[:, None, None], S, slots), N // J, axis=1)
        rows, heads = jnp.arange(B)[:, None, None], jnp.arange(N)[None, :, None]
        return lists, memory.at[rows, heads, index].add(weights, mode="drop")
