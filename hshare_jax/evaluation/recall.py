"""Recall: how much of the true attention falls on the tokens that a method reads."""

import dataclasses
from dataclasses import field

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from hshare_jax.decode_state import DecodeState
from hshare_jax.kernels.int8_rows import Rows
from hshare_jax.kernels.labels import score_keys
from hshare_jax.kernels.masked_softmax import softmax_over
from hshare_jax.kv_cache import KVCache
from hshare_jax.mesh import dims
from hshare_jax.methods.base import Choices, Method, MethodState, Step, mark_dense, mean_over_devices
from hshare_jax.models.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Measured:
    """A method's state whose recall is measured on every `every`-th step: a `MethodState` around another one.

    Recall is the mass of exact attention, over all that a query may see, on the slots that its head reads. It is the
    mean over all heads and layers, dense layers included.
    """

    measured: MethodState
    total: Array = field(metadata=dims("B"))  # float32, the sum over this step's layers of the heads' mean
    count: Array = field(metadata=dims(""))  # int32, steps so far
    every: int = field(metadata={"static": True})

    @property
    def refresh_interval(self) -> int:
        """The measured method's interval."""
        return self.measured.refresh_interval

    def is_of(self, method: Method) -> bool:
        """Whether the measured method's state is of this method."""
        return self.measured.is_of(method)

    def begin(self, step: Step) -> "Measured":
        """The state at the beginning of a step, with nothing measured yet."""
        begun = self.measured.begin(step)
        return dataclasses.replace(self, measured=begun, total=jnp.zeros_like(self.total), count=self.count + 1)

    def attend(
        self,
        layer: int,
        q: Float[Array, "B N H"],
        k: Float[Array, "B 1 K H"] | None,
        keys: Rows,
        values: Rows,
        step: Step,
    ) -> tuple[Float[Array, "B N H"], "Measured"]:
        """The measured method's attention, and the sum with this layer's recall."""
        out, measured = self.measured.attend(layer, q, k, keys, values, step)

        def measure() -> Float[Array, "B"]:
            is_seen = mark_dense(layer, step.lengths, keys.shape[2], step.config)
            weights = softmax_over(is_seen, score_keys(q, keys))
            now = KVCache((keys,), (values,), step.lengths)  # this layer's cache, with the new token
            marks = measured.mark_reads(layer, now, step.config)
            B, N, S = weights.shape
            grouped = weights.reshape(B, marks.shape[1], -1, S)
            of_heads = jnp.where(marks[:, :, None, :], grouped, 0).sum(axis=-1)
            return mean_over_devices(of_heads.mean(axis=(1, 2)), step.config)

        new = lax.cond((self.count - 1) % self.every == 0, measure, lambda: jnp.zeros_like(self.total))
        return out, dataclasses.replace(self, measured=measured, total=self.total + new)

    def count_reads(self, cache: KVCache, config: ModelConfig) -> Float[Array, "B"]:
        """The measured method's reads."""
        return self.measured.count_reads(cache, config)

    def mark_reads(self, layer: int, cache: KVCache, config: ModelConfig) -> Bool[Array, "B J S"]:
        """The slots that the measured method read."""
        return self.measured.mark_reads(layer, cache, config)

    def count_choices(self, steps: Int[np.ndarray, "B"], lengths: Int[np.ndarray, "B"], config: ModelConfig) -> Choices:
        """The measured method's choices."""
        return self.measured.count_choices(steps, lengths, config)


def measure_recall(state: DecodeState, every: int = 1) -> DecodeState:
    """The same state, whose steps also measure recall on the first of every `every` steps."""
    if state.method_state is None:
        return state
    total = jnp.zeros(state.cache.lengths.shape, jnp.float32)
    return dataclasses.replace(state, method_state=Measured(state.method_state, total, jnp.int32(0), every))


def without_recall(state: DecodeState) -> DecodeState:
    """The same state, whose steps measure nothing."""
    inner = state.method_state
    return dataclasses.replace(state, method_state=inner.measured if isinstance(inner, Measured) else inner)


def recall_of(state: DecodeState, config: ModelConfig) -> Float[Array, "B"]:
    """Recall of the last step, the mean over layers and heads: 0 where it was not measured, 1 for dense decoding.

    Raises:
        ValueError: the state of a sparse method that `measure_recall` did not prepare.
    """
    if state.method_state is None:
        return jnp.ones(state.cache.lengths.shape, jnp.float32)
    if not isinstance(state.method_state, Measured):
        raise ValueError("the state does not measure recall: give measure_recall(state) to the steps")
    return state.method_state.total / config.num_layers
