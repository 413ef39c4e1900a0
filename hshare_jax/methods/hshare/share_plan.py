"""The share plan: one integer array that says which list every list reads.

`source[b, l, j]` is the flat id (layer * J + list) of the list that list j of layer l reads in row b. A list is
computed exactly where it is its own source. Plans are data: one compiled step serves them all. A plan known before
compilation can be a constant instead: a SharePlan.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.models.config import ModelConfig
from hshare_jax.shapes import Similarity, Source


@dataclasses.dataclass(frozen=True)
class SharePlan:
    """A plan as a constant: hashable, part of the compiled program, so that lists which copy trace to no selection.

    Raises ValueError where a list reads one that is above it, does not exist, or is a copy.
    """

    source: tuple[tuple[int, ...], ...]  # [L][J] flat ids

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", tuple(map(tuple, self.source)))
        J = len(self.source[0]) if self.source else 0
        flat = [target for layer in self.source for target in layer]
        if J == 0 or any(len(layer) != J for layer in self.source):
            raise ValueError("source must hold the same number of lists, at least one, for every layer")
        for unit, target in enumerate(flat):
            where = f"source[{unit // J}][{unit % J}]={target!r}"
            if not isinstance(target, int) or not 0 <= target <= unit:
                raise ValueError(f"{where} must be a flat id from 0 to its own, {unit}: a list copies a lower one")
            if flat[target] != target:
                raise ValueError(f"{where} must be a list that is computed, but that one copies {flat[target]}")

    def owns(self, layer: int) -> bool:
        """Returns whether any list of this layer is computed there."""
        J = len(self.source[layer])
        return any(target == layer * J + j for j, target in enumerate(self.source[layer]))

    def check(self, model: ModelConfig, config: HShareSettings) -> None:
        """Raises ValueError unless the plan has this model's layers and, with these settings, lists."""
        L, J = len(self.source), len(self.source[0])
        if (model.num_layers, config.num_lists(model)) != (L, J):
            raise ValueError(
                f"the plan is for {L} layers of {J} lists; this model with lists_per={config.lists_per!r} has "
                f"{model.num_layers} layers of {config.num_lists(model)}"
            )
        dense = [target for layer in self.source[config.dense_layers :] for target in layer]
        if dense and min(dense) < config.dense_layers * J:
            raise ValueError(
                f"the plan copies from the first {config.dense_layers} layers, which are dense and have no lists; "
                f"calibrate with dense_layers={config.dense_layers}, or decode with fewer"
            )


def kv_layer_plan(model: ModelConfig, config: HShareSettings) -> SharePlan:
    """Returns the plan in which layers that share keys and values share lists: those of the lowest, if it is sparse.

    For a model with cross-layer KV sharing (`ModelConfig.kv_layer_map`): one selection serves all that read one cache.

    # kv_layer_map (0, 2, 2, 2, 4), one list a layer, layer 0 dense:  0 | 1 1 1 | 4
    """
    J, lowest, source = config.num_lists(model), {}, []
    for layer in range(model.num_layers):
        group = (model.kv_layer(layer), layer < config.dense_layers)
        first = lowest.setdefault(group, layer)
        source.append(tuple(first * J + j for j in range(J)))
    return SharePlan(tuple(source))


def identity_plan(batch_size: int, num_layers: int, num_lists: int) -> Source:
    """Returns the plan in which nothing is shared."""
    flat = jnp.arange(num_layers * num_lists, dtype=jnp.int32).reshape(1, num_layers, num_lists)
    return jnp.tile(flat, (batch_size, 1, 1))


def greedy_map(similarity: Float[Array, "n n"], num_shared: int) -> Int[Array, "n"]:
    """Returns which unit each unit copies, itself where it does not: `num_shared` units copy a lower one.

    HShare's Algorithm 1: take the most similar pair (i, j), j < i, the first in row-major order on ties; let i, and
    whatever copied i, copy j; take i out. It stops early when nothing is similar at all.

        # R[1,0]=.9 R[2,1]=.8 R[3,2]=.7, others lower, 2 shared:  1 copies 0 and leaves, then 3 copies 2  -> [0, 0, 2,
        # 2]
    """
    n = similarity.shape[0]
    unit = jnp.arange(n, dtype=jnp.int32)
    is_lower = unit[:, None] > unit[None, :]

    def share(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        left, copies = carry
        best = jnp.argmax(left).astype(jnp.int32)
        i, j = best // n, best % n
        is_similar = left[i, j] > 0
        copies = jnp.where(is_similar & (copies == i), j, copies)
        is_gone = (unit[:, None] == i) | (unit[None, :] == i)
        return jnp.where(is_gone, -1.0, left), copies

    # -1 and not 0: an argmax over what may not be chosen would otherwise map unit 0 to itself as a share.
    left = jnp.where(is_lower, similarity, -1.0)
    return lax.fori_loop(0, num_shared, share, (left, unit))[1]


def compose(layer_map: Int[Array, "L"], list_maps: Int[Array, "L J"]) -> Int[Array, "L J"]:
    """Returns one row's plan: a copying layer reads the lists that its source layer reads; its own map is unused."""
    return layer_map[:, None] * list_maps.shape[1] + list_maps[layer_map]


def find_plan(similarity: Similarity, *, model: ModelConfig, config: HShareSettings) -> Source:
    """Returns each row's plan from what `measure_similarity` found, or the same one for all under `plan_scope="batch"`.

    The similarity of a batch is the mean over its rows that have probes.
    """
    if config.plan_scope == "batch":
        similarity = jax.tree.map(_mean_over_rows, similarity)
    if isinstance(similarity, tuple):
        return find_published_plan(*similarity, model=model, config=config)
    if config.plan == "anchors":
        return find_anchor_plan(similarity, model=model, config=config)
    return find_units_plan(similarity, model=model, config=config)


def _mean_over_rows(similarity: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    count = (similarity != 0).any(axis=range(1, similarity.ndim)).sum()
    mean = similarity.sum(axis=0, keepdims=True) / jnp.maximum(count, 1)
    return jnp.broadcast_to(mean, similarity.shape)


def find_published_plan(
    layer_similarity: Float[Array, "B L L"],
    list_similarity: Float[Array, "B L J J"],
    *,
    model: ModelConfig,
    config: HShareSettings,
) -> Source:
    """Returns each row's plan by the paper's greedy maps: of the layers that are not dense, then of a layer's lists.

    A row without probes, all of whose similarities are 0, gets the identity.
    """
    dense, num_layers = config.dense_layers, config.num_shared_layers(model)
    num_lists = config.num_shared_lists(model)

    def plan_row(layers: Array, lists: Array) -> Array:
        list_maps = jax.vmap(lambda similarity: greedy_map(similarity, num_lists))(lists)
        layer_map = dense + greedy_map(layers[dense:, dense:], num_layers)
        return compose(jnp.concatenate([jnp.arange(dense, dtype=jnp.int32), layer_map]), list_maps)

    if dense >= model.num_layers:
        return identity_plan(layer_similarity.shape[0], *list_similarity.shape[1:3])
    return jax.vmap(plan_row)(layer_similarity, list_similarity)


def choose_sources(caught: Float[Array, "n n"], num_sources: int) -> Int[Array, "n"]:
    """Returns which unit each unit copies, itself for the `num_sources` that are computed: greedy facility location.

    The first unit is a source. Then, again and again, that unit becomes one which most raises what all units together
    catch from their best source at or below them; the lower unit on ties. Each copies its best source.

        # caught, lower triangle: [1], [.9, 1], [.2, .3, 1], [0, 0, .8, 1]
        # 2 sources: 0, then 2 (.8 more for itself, .8 for 3)  -> [0, 0, 2, 2]

    Args:
        caught: what unit i catches with the list of unit j; only j <= i counts.
        num_sources: how many lists are computed, at least 1.
    """
    n = caught.shape[0]
    unit = jnp.arange(n, dtype=jnp.int32)
    caught = jnp.where(unit[:, None] >= unit[None, :], caught, 0)

    def add_source(_: Array, is_source: Bool[Array, "n"]) -> Bool[Array, "n"]:
        best = jnp.where(is_source[None, :], caught, 0).max(axis=1)
        gain = jnp.maximum(caught - best[:, None], 0).sum(axis=0)
        return is_source.at[jnp.argmax(jnp.where(is_source, -1.0, gain))].set(True)

    is_source = lax.fori_loop(0, num_sources - 1, add_source, unit == 0)
    copied = jnp.argmax(jnp.where(is_source[None, :] & (unit[None, :] <= unit[:, None]), caught, -1.0), axis=1)
    return jnp.where(is_source, unit, copied.astype(jnp.int32))


def find_units_plan(caught: Float[Array, "B U U"], *, model: ModelConfig, config: HShareSettings) -> Source:
    """Returns each row's plan in which any list may copy any lower list: the one that loses least attention.

    Dense layers have no lists to copy. A row without probes, all zeros, gets the identity.
    """
    L, J = model.num_layers, config.num_lists(model)
    identity = identity_plan(1, L, J)[0]
    first, num_sources = config.dense_layers * J, config.num_computed_lists(model)
    if not config.shares_lists(model):
        return jnp.tile(identity, (caught.shape[0], 1, 1))

    def plan_row(row: Array) -> Array:
        units = first + choose_sources(row[first:, first:], num_sources)
        plan = jnp.concatenate([identity.reshape(-1)[:first], units]).reshape(L, J)
        return jnp.where(row.max() > 0, plan, identity)

    return jax.vmap(plan_row)(caught)


def choose_anchors(caught: Float[Array, "n n"], num_anchors: int) -> Int[Array, "n"]:
    """Returns which unit each unit copies: the nearest of the best `num_anchors` anchors at or below it.

    Dynamic programming over where the stretches of an anchor and its followers end: of all choices it finds the one
    with the greatest sum of caught[i, anchor of i]; the lower anchors on ties. The first unit is an anchor.

    Args:
        caught: what unit i catches with the list of unit j; only j <= i counts.
        num_anchors: from 1 to n.
    """
    n = caught.shape[0]
    unit = jnp.arange(n, dtype=jnp.int32)
    # worth[j, e]: what units j to e - 1 catch with anchor j.
    worth = jnp.concatenate(
        [jnp.zeros((n, 1)), jnp.cumsum(jnp.where(unit[None, :] >= unit[:, None], caught.T, 0), axis=1)], axis=1
    )
    ends = jnp.arange(n + 1)
    is_stretch = unit[:, None] < ends[None, :]

    def add_stretch(best: Float[Array, "ends"], _: None) -> tuple[Float[Array, "ends"], Int[Array, "ends"]]:
        totals = jnp.where(is_stretch, best[:n, None] + worth, -jnp.inf)
        return totals.max(axis=0), totals.argmax(axis=0).astype(jnp.int32)

    # Of the units before an end, so many stretches; nothing is caught before the first.
    empty = jnp.where(ends == 0, 0.0, -jnp.inf)
    _, last_anchors = lax.scan(add_stretch, empty, length=num_anchors)

    def mark(end: Int[Array, ""], last: Int[Array, "ends"]) -> tuple[Int[Array, ""], Int[Array, ""]]:
        return last[end], last[end]

    _, anchors = lax.scan(mark, jnp.int32(n), last_anchors, reverse=True)
    return jnp.where(anchors[None, :] <= unit[:, None], anchors[None, :], 0).max(axis=1)


def find_anchor_plan(caught: Float[Array, "B U U"], *, model: ModelConfig, config: HShareSettings) -> Source:
    """Returns each row's plan in which a layer copies all its lists, head for head, from the anchor at or below it.

    A row without probes, all zeros, gets the identity.
    """
    L, J, dense = model.num_layers, config.num_lists(model), config.dense_layers
    identity = identity_plan(1, L, J)[0]
    num_anchors = config.num_sparse_layers(model) - config.num_shared_layers(model)

    def plan_row(row: Array) -> Array:
        of_layers = jnp.einsum("LJMJ->LM", row.reshape(L, J, L, J))
        anchors = dense + choose_anchors(of_layers[dense:, dense:], num_anchors)
        layers = jnp.concatenate([jnp.arange(dense, dtype=jnp.int32), anchors])
        return jnp.where(row.max() > 0, compose(layers, jnp.tile(jnp.arange(J, dtype=jnp.int32), (L, 1))), identity)

    if dense >= L:
        return jnp.tile(identity, (caught.shape[0], 1, 1))
    return jax.vmap(plan_row)(caught)
