"""HShare while decoding: lists of critical tokens, chosen where the plan asks for it and read through the plan."""

import dataclasses
from dataclasses import field

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from hshare_jax.kernels.api import append_labels, dense_decode, sparse_decode
from hshare_jax.kernels.int8_rows import Rows, row_bytes
from hshare_jax.kernels.labels import Labels
from hshare_jax.kernels.masked_softmax import MASKED
from hshare_jax.kernels.reads import mark_listed
from hshare_jax.kernels.tail import HIGH, Tail
from hshare_jax.kv_cache import KVCache, replace_layer
from hshare_jax.mesh import dims, to_host
from hshare_jax.methods.base import (
    Choices,
    Method,
    Step,
    count_dense,
    count_listed,
    identity_plan,
    mark_dense,
    mean_over_devices,
)
from hshare_jax.methods.hshare.critical_tokens import choose_lists
from hshare_jax.methods.hshare.pools import choose_in_pools
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.methods.hshare.share_plan import SharePlan, mark_computed, through_plan
from hshare_jax.models.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedLists:
    """HShare's `MethodState`: the critical tokens of every layer in one buffer, and what choosing them anew needs."""

    # int32 slots, ascending, padded with EMPTY; with pools, what each list chose
    token_indices: Array = field(metadata=dims("L B J C"))
    # [L, B, J, pool * C] likewise, what the computed lists keep; None without pools
    pools: Array | None = field(metadata=dims("L B J"))
    source: Array = field(metadata=dims("B L J", flat_ids=True))  # int32, the share plan
    channels: Array = field(metadata=dims("B L K R"))  # int32, label channels
    # of each KV layer, as in the cache; None where no label is scored
    labels: tuple[Labels | None, ...] = field(metadata=dims("B K"))
    recent_start: Array = field(metadata=dims("B"))  # int32, first slot of the recent range, set at the last refresh
    age: Array = field(metadata=dims("B"))  # int32, decode steps since the plan was found
    # of each layer; None in dense layers, and everywhere without tails
    tails: tuple[Tail | None, ...] = field(metadata=dims("B N"))
    settings: HShareSettings = field(metadata={"static": True})
    plan: SharePlan | None = field(metadata={"static": True})  # a constant plan; `source` holds it too
    has_channels: bool = field(metadata={"static": True})  # whether channels were given beforehand

    @property
    def refresh_interval(self) -> int:
        """Decode steps that one choice serves."""
        return self.settings.refresh_interval

    def is_of(self, method: Method) -> bool:
        """Whether the method has the settings, the plan and the kind of channels that this state began with."""
        given = getattr(method, "settings", None), getattr(method, "plan", None)
        return given == (self.settings, self.plan) and (getattr(method, "channels", None) is None) != self.has_channels

    def begin(self, step: Step) -> "SharedLists":
        """The lists one step older, with the recent range where this step reads it."""
        older = dataclasses.replace(self, age=self.age + step.is_active)
        # The recent range keeps its start until the next refresh, and grows. Beyond max_recent it slides.
        start = jnp.where(older._is_due(step), step.lengths - self.settings.num_recent, self.recent_start)
        start = jnp.maximum(start, step.lengths - self.settings.max_recent)
        return dataclasses.replace(older, recent_start=jnp.maximum(start, 0))

    def _is_due(self, step: Step) -> Bool[Array, "B"]:
        """The rows that choose at this step, which has begun: all rows, no row, or the rows of the right age."""
        if step.refresh is not None:
            return step.is_active & step.refresh
        return step.is_active & ((self.age - 1) % self.refresh_interval == 0)

    def _chooses(self, step: Step) -> Bool[Array, "B"]:
        """The rows that are due, but for those that read everything until they are due again."""
        return self._is_due(step) & (step.lengths + self.refresh_interval > self.settings.dense_below)

    def attend(
        self,
        layer: int,
        q: Float[Array, "B N H"],
        k: Float[Array, "B 1 K H"] | None,
        keys: Rows,
        values: Rows,
        step: Step,
    ) -> tuple[Float[Array, "B N H"], "SharedLists"]:
        """Attention through the plan, and the lists with what this layer chose."""
        settings = self.settings
        lists = self if k is None else self._append_labels(layer, k, step)
        lengths, window = step.sees(layer)
        if layer < settings.num_dense:
            return dense_decode(q, keys, values, lengths, window=window, impl=step.impl), lists
        if step.refresh is not False:
            lists = lists._choose(layer, q, keys, step)
        if lists.pools is not None:
            lists = lists._choose_in_pools(layer, q, keys, step)
        # A layer that looks up sees one token less. Its limit is one lower, so that all layers turn sparse on one step.
        min_length = max(settings.dense_below - step.config.looks_up(layer), 0)
        out = sparse_decode(
            q, keys, values, lists.token_indices, lists.read_source, layer, lengths, lists.recent_start,
            num_sinks=settings.num_sinks, max_recent=settings.max_recent, window=window, min_length=min_length,
            tail=lists.tails[layer], impl=step.impl,
        )  # fmt: skip
        return out, lists

    def _append_labels(self, layer: int, k: Float[Array, "B 1 K H"], step: Step) -> "SharedLists":
        index = step.config.kv_index(layer)
        labels = self.labels[index]
        if labels is None:
            return self
        bits = self.settings.label_bits
        labels = append_labels(labels, layer, k, self.channels, step.slots, bits=bits, impl=step.impl)
        return dataclasses.replace(self, labels=replace_layer(self.labels, index, labels))

    def _choose(self, layer: int, q: Float[Array, "B N H"], keys: Rows, step: Step) -> "SharedLists":
        """Chooses this layer's computed lists in the rows that are due. The other lists stay.

        When no row is due this is free on a CPU, and a few launches that return at once on a GPU. Under exact scoring a
        GPU still scores the whole cache.
        """
        if self.plan is not None and not self.plan.is_computed[layer].any():
            return self
        chosen = "token_indices" if self.pools is None else "pools"
        lists = choose_lists(
            getattr(self, chosen), layer, q, keys, self.labels[step.config.kv_index(layer)], self.channels[:, layer],
            self.source, self._chooses(step), step.lengths,
            settings=self.settings, window=step.config.windows[layer], impl=step.impl,
        )  # fmt: skip
        return dataclasses.replace(self, **{chosen: lists})

    def _choose_in_pools(self, layer: int, q: Float[Array, "B N H"], keys: Rows, step: Step) -> "SharedLists":
        """Chooses all lists of this layer anew, each in the pool that the plan gives it."""
        assert self.pools is not None
        pools = through_plan(self.pools, self.source[:, layer])
        labels, window = self.labels[step.config.kv_index(layer)], step.config.windows[layer]
        lists = choose_in_pools(
            q, pools, keys, labels, self.channels[:, layer], step.lengths,
            settings=self.settings, window=window, impl=step.impl,
        )  # fmt: skip
        return dataclasses.replace(self, token_indices=self.token_indices.at[layer].set(lists))

    @property
    def read_source(self) -> Int[Array, "B L J"]:
        """The plan through which `token_indices` are read: the share plan, or with pools each list itself."""
        return self.source if self.pools is None else identity_plan(*self.source.shape)

    def count_reads(self, cache: KVCache, config: ModelConfig) -> Float[Array, "B"]:
        """Tokens that the last step read, the mean over layers and heads."""
        listed = through_plan(self.token_indices, self.read_source)  # [B, L, J, C]
        sparse = count_listed(listed, self.recent_start, self.settings.num_sinks, cache, config)
        dense = count_dense(cache, config)
        sparse = sparse + jnp.where(sparse < dense, self._count_virtual(cache, config), 0)
        is_dense = jnp.arange(config.num_layers)[:, None] < self.settings.num_dense
        is_dense = is_dense | (cache.lengths < self.settings.dense_below)[None, :]
        return mean_over_devices(jnp.where(is_dense, dense, sparse).mean(axis=0), config)

    def _count_virtual(self, cache: KVCache, config: ModelConfig) -> Float[Array, "L B"]:
        """What a list's virtual tokens weigh, in cached tokens. Its heads share its tokens, but not their tails."""
        per_list = config.num_heads / self.source.shape[2]
        of_layers = [
            jnp.zeros(self.age.shape)
            if tail is None
            else tail.num_tokens(row_bytes(cache.keys[0])) * per_list * (tail.terms[..., HIGH] > MASKED).mean(axis=1)
            for tail in self.tails
        ]
        return jnp.stack(of_layers)

    def mark_reads(self, layer: int, cache: KVCache, config: ModelConfig) -> Bool[Array, "B J S"]:
        """The slots that the last step read in this layer, for each list."""
        dense = mark_dense(layer, cache.lengths, cache.capacity, config)[:, None, :]
        listed = through_plan(self.token_indices, self.read_source[:, layer])
        marks = mark_listed(listed, self.recent_start, self.settings.num_sinks, cache.capacity)
        is_dense = (cache.lengths < self.settings.dense_below) | (layer < self.settings.num_dense)
        return dense & (marks | is_dense[:, None, None])

    def count_choices(self, steps: Int[np.ndarray, "B"], lengths: Int[np.ndarray, "B"], config: ModelConfig) -> Choices:
        """How often lists were chosen by rows of these lengths, in so many decode steps since their plan was found."""
        first, J, interval = self.settings.num_dense, self.source.shape[2], self.refresh_interval
        # Before its step of this number, counted from 0, a row read everything and did not choose (`_chooses`).
        begin = np.clip(self.settings.dense_below - interval - (lengths - steps), 0, steps)
        refreshes = -(-steps // interval) - -(-begin // interval)
        computed = mark_computed(to_host(self.source))[:, first:].sum(axis=(1, 2))
        possible = self.settings.num_sparse_layers(config) * J * int(steps.sum())
        return Choices(int(refreshes.sum()), int((refreshes * computed).sum()), possible)
