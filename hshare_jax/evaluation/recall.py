"""Recall: how much of the true attention falls on the tokens that a method reads."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from hshare_jax.decode_state import DecodeState
from hshare_jax.kernels.labels import score_keys
from hshare_jax.kernels.masked_softmax import softmax_over
from hshare_jax.kv_cache import KVCache
from hshare_jax.methods.base import MethodState, PromptQueries, Step, mark_dense
from hshare_jax.models.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Measured:
    """A method whose recall is taken on every `every`-th step: a `MethodState` around another.

    Recall is the mass of exact attention, over all that a query may see, on the slots that its head reads; the mean
    over all heads and layers, dense ones included.
    """

    selection: MethodState
    total: Array  # [B] float32, the sum over this step's layers of the heads' mean
    count: Array  # int32, steps so far
    every: int = dataclasses.field(metadata={"static": True})

    @property
    def refresh_interval(self) -> int:
        """Returns the method's."""
        return self.method_state.refresh_interval

    @property
    def wants_received(self) -> bool:
        """Returns the method's."""
        return self.method_state.wants_received

    def probe_positions(self, starts: Int[Array, "B"], lengths: Int[Array, "B"], num_tokens: int) -> Int[Array, "B P"]:
        """Returns the method's."""
        return self.method_state.probe_positions(starts, lengths, num_tokens)

    def after_prefill(
        self, queries: PromptQueries, positions: Int[Array, "B P"], cache: KVCache, model: ModelConfig
    ) -> "Measured":
        """Returns the method after the prefill."""
        return dataclasses.replace(self, selection=self.method_state.after_prefill(queries, positions, cache, model))

    def begin(self, step: Step) -> "Measured":
        """Returns the method at the beginning of a step, nothing measured yet."""
        total = jnp.zeros_like(self.total)
        return dataclasses.replace(self, selection=self.method_state.begin(step), total=total, count=self.count + 1)

    def attend(
        self,
        layer: int,
        q: Float[Array, "B N H"],
        k: Float[Array, "B 1 K H"] | None,
        keys: Array,
        values: Array,
        step: Step,
    ) -> tuple[Float[Array, "B N H"], "Measured"]:
        """Returns (the method's attention, the sum with this layer's recall)."""
        out, selection = self.method_state.attend(layer, q, k, keys, values, step)

        def measure() -> Float[Array, "B"]:
            is_seen = mark_dense(layer, step.lengths, keys.shape[2], step.model)
            weights = softmax_over(is_seen, score_keys(q, keys))
            now = KVCache((keys,), (values,), step.lengths)  # as this layer has it: the new token included
            marks = selection.mark_reads(layer, now, step.model)
            B, N, S = weights.shape
            grouped = weights.reshape(B, marks.shape[1], -1, S)
            return jnp.where(marks[:, :, None, :], grouped, 0).sum(axis=-1).mean(axis=(1, 2))

        new = lax.cond((self.count - 1) % self.every == 0, measure, lambda: jnp.zeros_like(self.total))
        return out, dataclasses.replace(self, selection=selection, total=self.total + new)

    def count_reads(self, cache: KVCache, model: ModelConfig) -> Float[Array, "B"]:
        """Returns the method's."""
        return self.method_state.count_reads(cache, model)

    def mark_reads(self, layer: int, cache: KVCache, model: ModelConfig) -> Bool[Array, "B J S"]:
        """Returns the method's."""
        return self.method_state.mark_reads(layer, cache, model)


def measure_recall(state: DecodeState, every: int = 1) -> DecodeState:
    """Returns a state whose steps take recall along, on the first of every `every` steps."""
    if state.method_state is None:
        return state
    total = jnp.zeros(state.cache.lengths.shape, jnp.float32)
    return DecodeState(state.cache, Measured(state.method_state, total, jnp.int32(0), every))


def recall_of(state: DecodeState, model: ModelConfig) -> Float[Array, "B"]:
    """Returns the recall of the last step, the mean over layers and heads; 0 where it was not taken, 1 if dense.

    Raises:
        ValueError: the state of a sparse method that `measure_recall` was not asked for.
    """
    if state.method_state is None:
        return jnp.ones(state.cache.lengths.shape, jnp.float32)
    if not isinstance(state.method_state, Measured):
        raise ValueError("the state takes no recall along: give measure_recall(state) to the steps")
    return state.method_state.total / model.num_layers
