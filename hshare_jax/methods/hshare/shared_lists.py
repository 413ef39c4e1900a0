"""HShare while decoding: lists of critical tokens, chosen where the plan asks for it and read through the plan."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from hshare_jax.kernels.api import dense_decode, select_by_keys, select_by_labels, sparse_decode
from hshare_jax.kernels.labels import Labels, label_query, make_labels
from hshare_jax.kv_cache import KVCache, append
from hshare_jax.methods.base import PromptQueries, Step, count_dense, count_listed, mark_dense, mark_listed
from hshare_jax.methods.hshare.channels import choose_channels
from hshare_jax.methods.hshare.critical_tokens import candidate_range, num_critical_in_budget
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.methods.hshare.share_plan import SharePlan, find_plan, identity_plan
from hshare_jax.methods.hshare.similarity import measure_similarity, probe_positions
from hshare_jax.models.config import ModelConfig
from hshare_jax.shapes import EMPTY, Similarity, round_up_coarsely

PROBE_STEP = 64  # with all queries as probes their number rounds up, so that a longer prompt may compile nothing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedLists:
    """Critical tokens of every layer in one buffer, and what is needed to choose them anew: a `MethodState`."""

    token_indices: Array  # [L, B, J, C] int32 slots, ascending, padded with EMPTY
    source: Array  # [B, L, J] int32, the share plan
    channels: Array  # [B, L, K, R] int32, label channels
    labels: tuple[Labels | None, ...]  # of each KV layer, as in the cache; None where none are scored
    recent_start: Array  # [B] int32, first slot of the recent range, set at the last refresh
    age: Array  # [B] int32, decode steps since the plan was found
    config: HShareSettings = dataclasses.field(metadata={"static": True})
    plan: SharePlan | None = dataclasses.field(metadata={"static": True})  # a constant plan, that `source` holds too
    has_fixed_channels: bool = dataclasses.field(metadata={"static": True})  # channels are given, not the prompt's

    @property
    def refresh_interval(self) -> int:
        """Returns how many decode steps one choice serves."""
        return self.config.refresh_interval

    @property
    def wants_received(self) -> bool:
        """Returns False: received attention is not asked for."""
        return False

    def probe_positions(self, starts: Int[Array, "B"], lengths: Int[Array, "B"], num_tokens: int) -> Int[Array, "B P"]:
        """Returns where the probes stand that a plan is found from; nowhere if it is known."""
        P = self.config.num_probes
        if P == "all":
            P = round_up_coarsely(num_tokens, PROBE_STEP)
        return probe_positions(starts, lengths, self.config, P if self.plan is None else 0)[0]

    def after_prefill(
        self, queries: PromptQueries, positions: Int[Array, "B P"], cache: KVCache, model: ModelConfig
    ) -> "SharedLists":
        """Returns the lists' state with channels, labels and plan, those that are not given, found from the prompt."""
        return _find_lists(self, queries, positions, cache, model=model)

    def label_prompt(self, queries: PromptQueries, cache: KVCache, model: ModelConfig) -> "SharedLists":
        """Returns the lists' state with labels of the whole cache, on channels found from the prompt or given."""
        channels = self.channels
        if not self.has_fixed_channels:
            R = self.config.num_label_channels(model)
            by_keys = zip(queries.sizes, cache.keys, strict=True)
            of_keys = [choose_channels(q, k, cache.lengths, R) for q, k in by_keys]
            channels = jnp.stack([of_keys[model.kv_index(layer)] for layer in range(model.num_layers)], axis=1)
        labels = tuple(
            None if old is None else make_labels(keys, channels[:, layer], self.config.label_bits)
            for layer, keys, old in zip(model.kv_layers, cache.keys, self.labels, strict=True)
        )
        return dataclasses.replace(self, channels=channels, labels=labels, age=jnp.zeros_like(self.age))

    def measure_similarity(
        self, queries: PromptQueries, positions: Int[Array, "B P"], cache: KVCache, model: ModelConfig
    ) -> Similarity:
        """Returns what a plan is found from, by the labels of the prompt."""
        return measure_similarity(
            queries.probes, cache.keys, self.labels, self.channels, positions, model=model, config=self.config
        )

    def begin(self, step: Step) -> "SharedLists":
        """Returns these lists a step older, with the recent range where this step reads it."""
        older = dataclasses.replace(self, age=self.age + step.is_active)
        # The recent range starts where it did at the refresh and grows; a caller who never refreshes has it slide.
        start = jnp.where(older._is_due(step), step.lengths - self.config.num_recent, self.recent_start)
        start = jnp.maximum(start, step.lengths - self.config.max_recent)
        return dataclasses.replace(older, recent_start=jnp.maximum(start, 0))

    def _is_due(self, step: Step) -> Bool[Array, "B"]:
        """Returns the rows that choose on this step, which has begun: all or none, or those of the right age."""
        if step.refresh is not None:
            return step.is_active & step.refresh
        return step.is_active & ((self.age - 1) % self.refresh_interval == 0)

    def attend(
        self,
        layer: int,
        q: Float[Array, "B N H"],
        k: Float[Array, "B 1 K H"] | None,
        keys: Array,
        values: Array,
        step: Step,
    ) -> tuple[Float[Array, "B N H"], "SharedLists"]:
        """Returns (attention through the plan, the lists with what was chosen)."""
        config = self.config
        shared = self if k is None else self._append_labels(layer, k, step)
        lengths, window = step.sees(layer)
        if layer < config.dense_layers:
            return dense_decode(q, keys, values, lengths, window=window, impl=step.impl), shared
        if step.refresh is not False:
            shared = shared._choose(layer, q, keys, step)
        min_length = max(config.min_length - step.model.looks_up(layer), 0)  # the gate closes in all layers at once
        out = sparse_decode(
            q, keys, values, shared.token_indices, shared.source, layer, lengths, shared.recent_start,
            num_sinks=config.num_sinks, max_recent=config.max_recent, window=window, min_length=min_length,
            impl=step.impl,
        )  # fmt: skip
        return out, shared

    def _append_labels(self, layer: int, k: Float[Array, "B 1 K H"], step: Step) -> "SharedLists":
        index = step.model.kv_index(layer)
        labels = self.labels[index]
        if labels is None:
            return self
        new = make_labels(k.swapaxes(1, 2), self.channels[:, layer], self.config.label_bits)
        labels = jax.tree.map(lambda old, one: append(old, jnp.moveaxis(one, 3, 1), step.slots, axis=3), labels, new)
        return dataclasses.replace(self, labels=(*self.labels[:index], labels, *self.labels[index + 1 :]))

    def _choose(self, layer: int, q: Float[Array, "B N H"], keys: Array, step: Step) -> "SharedLists":
        """Chooses the lists of this layer that are their own source, in rows that are due; the others stay.

        A layer in which no row chooses costs nothing; on a GPU a few launches that return at once, but under exact
        scoring the scores of the whole cache.
        """
        if self.plan is not None and not self.plan.owns(layer):
            return self
        config, lists, is_due = self.config, self.token_indices, self._is_due(step)
        labels = self.labels[step.model.kv_index(layer)]
        first, last = candidate_range(step.lengths, config, step.model.windows[layer])
        competing = (self.source, is_due, first, last, num_critical_in_budget(step.lengths, config))
        if labels is None:
            lists = select_by_keys(lists, layer, q, keys, *competing, dilate=config.dilates, impl=step.impl)
        else:
            query = label_query(q, self.channels[:, layer], config.label_bits)
            lists = select_by_labels(lists, layer, query, labels, *competing, dilate=config.dilates, impl=step.impl)
        return dataclasses.replace(self, token_indices=lists)

    def count_reads(self, cache: KVCache, model: ModelConfig) -> Float[Array, "B"]:
        """Returns the tokens that the last step read, the mean over layers and heads."""
        J, rows = self.source.shape[2], jnp.arange(self.source.shape[0])[:, None, None]
        listed = self.token_indices[self.source // J, rows, self.source % J]  # [B, L, J, C]
        sparse = count_listed(listed, self.recent_start, self.config.num_sinks, cache, model)
        is_dense = jnp.arange(model.num_layers)[:, None] < self.config.dense_layers
        is_dense = is_dense | (cache.lengths < self.config.min_length)[None, :]
        return jnp.where(is_dense, count_dense(cache, model), sparse).mean(axis=0)

    def mark_reads(self, layer: int, cache: KVCache, model: ModelConfig) -> Bool[Array, "B J S"]:
        """Returns the slots that the last step read in this layer, by list."""
        unit, rows, J = self.source[:, layer], jnp.arange(self.source.shape[0])[:, None], self.source.shape[2]
        dense = mark_dense(layer, cache.lengths, cache.capacity, model)[:, None, :]
        marks = mark_listed(
            self.token_indices[unit // J, rows, unit % J], self.recent_start, self.config.num_sinks, cache.capacity
        )
        is_dense = (cache.lengths < self.config.min_length) | (layer < self.config.dense_layers)
        return dense & (marks | is_dense[:, None, None])


def init_lists(
    model: ModelConfig,
    config: HShareSettings,
    plan: SharePlan | None,
    channels: Array | np.ndarray | None,
    cache: KVCache,
) -> SharedLists:
    """Returns the lists of an empty cache; ValueError for a plan or channels that are not for model and settings."""
    B = cache.lengths.shape[0]
    L, K, J, R = model.num_layers, model.num_kv_heads, config.num_lists(model), config.num_label_channels(model)
    source = identity_plan(B, L, J)
    if plan is not None:
        plan.check(model, config)
        source = jnp.tile(jnp.asarray(plan.source, jnp.int32), (B, 1, 1))
    first = jnp.tile(jnp.arange(R, dtype=jnp.int32), (L, K, 1))
    if channels is not None and config.scoring == "exact":
        raise ValueError("channels were given, but scoring='exact' reads keys and has no labels; leave them out")
    if channels is not None:
        first = check_channels(channels, model, R)[jnp.asarray([model.kv_layer(layer) for layer in range(L)])]
    scored = [layer for layer in range(config.dense_layers, L) if plan is None or plan.owns(layer)]
    labelled = {model.kv_layer(layer) for layer in scored} if config.scoring == "labels" else set()
    return SharedLists(
        token_indices=jnp.full((L, B, J, config.num_critical), EMPTY, jnp.int32),
        source=source,
        channels=jnp.tile(first, (B, 1, 1, 1)),
        labels=tuple(
            _empty_labels(keys, R, config) if layer in labelled else None
            for layer, keys in zip(model.kv_layers, cache.keys, strict=True)
        ),
        recent_start=jnp.zeros((B,), jnp.int32),
        age=jnp.zeros((B,), jnp.int32),
        config=config,
        plan=plan,
        has_fixed_channels=channels is not None,
    )


def _empty_labels(keys: Array, num_channels: int, config: HShareSettings) -> Labels:
    codes, scales = _label_shapes(keys.shape, keys.dtype, num_channels, config.label_bits)
    return Labels(
        jnp.zeros(codes.shape, codes.dtype), None if scales is None else jnp.zeros(scales.shape, scales.dtype)
    )


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("lists",))
def _find_lists(
    lists: SharedLists, queries: PromptQueries, positions: Int[Array, "B P"], cache: KVCache, *, model: ModelConfig
) -> SharedLists:
    lists = lists.label_prompt(queries, cache, model)
    if lists.plan is not None:
        return lists
    similarity = lists.measure_similarity(queries, positions, cache, model)
    return dataclasses.replace(lists, source=find_plan(similarity, model=model, config=lists.config))


@functools.cache  # eval_shape traces anew on every call
def _label_shapes(
    keys_shape: tuple[int, ...], dtype: jnp.dtype, num_channels: int, bits: int | None
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct | None]:
    def make(keys: Array, channels: Array) -> tuple[Array, Array | None]:
        labels = make_labels(keys, channels, bits)
        return labels.codes, labels.scales

    channels = jax.ShapeDtypeStruct((*keys_shape[:2], num_channels), jnp.int32)
    return jax.eval_shape(make, jax.ShapeDtypeStruct(keys_shape, dtype), channels)


def check_channels(channels: Array | np.ndarray, model: ModelConfig, num_channels: int) -> Int[Array, "L K R"]:
    """Returns the best `num_channels` of every kv head, ascending; ValueError where they cannot be this model's."""
    given = np.asarray(channels)
    expected = (model.num_layers, model.num_kv_heads)
    if given.shape[:2] != expected or given.ndim != 3 or given.shape[2] < num_channels:
        raise ValueError(
            f"channels has shape {list(given.shape)}; this model needs {list(expected)} heads with at least "
            f"label_channels={num_channels} channels each"
        )
    best = np.sort(given[:, :, :num_channels], axis=-1)
    if best.min() < 0 or best.max() >= model.head_dim or (np.diff(best, axis=-1) == 0).any():
        raise ValueError(f"channels must be different numbers in [0, head_dim={model.head_dim}) for every head")
    return jnp.asarray(best, jnp.int32)
