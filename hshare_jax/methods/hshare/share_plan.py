"""The share plan: one integer array that says which list every list reads.

`source[b, l, j]` is the flat id (layer * J + list) of the list that list j of layer l reads in row b. A list is
computed if it reads itself, and copies otherwise. Plans are data, so one compiled step serves all plans. A plan that is
known before compilation can be a constant instead: a SharePlan.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from hshare_jax.methods.base import identity_plan
from hshare_jax.methods.hshare.settings import HShareSettings, PlanSearch
from hshare_jax.models.config import ModelConfig
from hshare_jax.shapes import Similarity, Source


@dataclasses.dataclass(frozen=True)
class SharePlan:
    """A plan as a constant: hashable, and part of the compiled program, in which layers that only copy select nothing.

    Raises:
        ValueError: a list that reads a higher list, a list that does not exist, or a copy.
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

    @property
    def is_computed(self) -> Bool[np.ndarray, "L J"]:
        """Which lists are computed; the others copy."""
        return np.asarray(mark_computed(np.asarray(self.source)[None]))[0]

    def check(self, config: ModelConfig, settings: HShareSettings) -> None:
        """Raises ValueError unless the plan has this model's layers and the lists that the settings ask for."""
        L, J = len(self.source), len(self.source[0])
        if (config.num_layers, settings.num_lists(config)) != (L, J):
            raise ValueError(
                f"the plan is for {L} layers of {J} lists; this model with lists_per={settings.lists_per!r} has "
                f"{config.num_layers} layers of {settings.num_lists(config)}"
            )
        dense = [target for layer in self.source[settings.num_dense :] for target in layer]
        if dense and min(dense) < settings.num_dense * J:
            raise ValueError(
                f"the plan copies from the first {settings.num_dense} layers, which are dense and have no lists; "
                f"calibrate with dense_layers={settings.num_dense}, or decode with fewer"
            )

    def check_parts(self, num_parts: int) -> None:
        """Raises ValueError if a list copies a list of another device, where each of `num_parts` has J / num_parts."""
        J = len(self.source[0])
        size = J // num_parts
        for layer, targets in enumerate(self.source):
            for j, target in enumerate(targets):
                if j // size != target % J // size:
                    raise ValueError(
                        f"the plan lets list {j} of layer {layer} copy list {target % J} of layer {target // J}, which "
                        f"another of {num_parts} devices keeps: find a plan for each prompt, or calibrate on this mesh"
                    )


def mark_computed(source: Int[Array | np.ndarray, "B L J"]) -> Bool[Array | np.ndarray, "B L J"]:
    """Marks the lists of a plan that are computed: those that are their own source."""
    _, L, J = source.shape
    return source == np.arange(L * J, dtype=np.int32).reshape(1, L, J)


def through_plan(lists: Int[Array, "*probes L B J W"], source: Int[Array, "B *layers J"]) -> Int[Array, "... J W"]:
    """What the lists of all layers, or of one layer, read by their part of a plan: (*probes, B, *layers, J, W)."""
    rows, J = jnp.arange(source.shape[0]).reshape(-1, *[1] * (source.ndim - 1)), source.shape[-1]
    return lists[..., source // J, rows, source % J, :]


def to_share_plan(source: Int[Array | np.ndarray, "L J"]) -> SharePlan:
    """One row's plan as a constant."""
    return SharePlan(tuple(tuple(layer) for layer in np.asarray(source).tolist()))


def kv_layer_plan(config: ModelConfig, settings: HShareSettings) -> SharePlan:
    """The plan in which layers that share keys and values also share the lists of the lowest sparse layer.

    For a model with cross-layer KV sharing (`ModelConfig.kv_layer_map`). One selection then serves all layers that read
    one cache.

        # kv_layer_map (0, 2, 2, 2, 4), one list a layer, layer 0 dense:  0 | 1 1 1 | 4
    """
    J, lowest, source = settings.num_lists(config), {}, []
    for layer in range(config.num_layers):
        group = (config.kv_layer(layer), layer < settings.num_dense)
        first = lowest.setdefault(group, layer)
        source.append(tuple(first * J + j for j in range(J)))
    return SharePlan(tuple(source))


def greedy_map(similarity: Float[Array, "n n"], num_shared: int) -> Int[Array, "n"]:
    """HShare's Algorithm 1: the unit that each unit copies, or the unit itself. `num_shared` units copy a lower one.

    Each round takes the most similar pair (i, j) with j < i, the first in row-major order on ties. Then i, and every
    unit that copied i, copies j, and i is out. The rounds stop early when no similarity is above 0.

        # R[1,0]=.9 R[2,1]=.8 R[3,2]=.7, others lower, 2 shared:
        # 1 copies 0 and is out, then 3 copies 2  -> [0, 0, 2, 2]
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

    # -1 and not 0: otherwise an argmax over forbidden pairs would count unit 0's copy of itself as a share.
    left = jnp.where(is_lower, similarity, -1.0)
    return lax.fori_loop(0, num_shared, share, (left, unit))[1]


def compose(layer_map: Int[Array, "L"], list_maps: Int[Array, "L J"]) -> Int[Array, "L J"]:
    """One row's plan. A layer that copies uses the list map of the source layer, and reads the same lists."""
    return layer_map[:, None] * list_maps.shape[1] + list_maps[layer_map]


def find_plan(similarity: Similarity, *, config: ModelConfig, settings: HShareSettings, search: PlanSearch) -> Source:
    """Each row's plan from the similarity that `similarity.MEASURES` found; one plan for all rows of a batch scope.

    The similarity of a batch is the mean over the rows that have probes.
    """
    if search.plan_scope == "batch":
        similarity = jax.tree.map(_mean_over_rows, similarity)
    if isinstance(similarity, tuple):
        return find_published_plan(*similarity, config=config, settings=settings, search=search)
    find = find_anchor_plan if search.plan_kind == "anchors" else find_units_plan
    return find(similarity, config=config, settings=settings, search=search)


def _mean_over_rows(similarity: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    count = (similarity != 0).any(axis=range(1, similarity.ndim)).sum()
    mean = similarity.sum(axis=0, keepdims=True) / jnp.maximum(count, 1)
    return jnp.broadcast_to(mean, similarity.shape)


def find_published_plan(
    layer_similarity: Float[Array, "B L L"],
    list_similarity: Float[Array, "B L J J"],
    *,
    config: ModelConfig,
    settings: HShareSettings,
    search: PlanSearch,
) -> Source:
    """Each row's plan by the paper's greedy maps: one of the layers that are not dense, and one of each layer's lists.

    A row without probes has similarity 0 everywhere, and gets the identity plan.
    """
    dense, num_layers = settings.num_dense, search.num_shared_layers(settings, config)
    num_lists = search.num_shared_lists(settings, config)

    def plan_row(layers: Array, lists: Array) -> Array:
        list_maps = jax.vmap(lambda similarity: greedy_map(similarity, num_lists))(lists)
        layer_map = dense + greedy_map(layers[dense:, dense:], num_layers)
        return compose(jnp.concatenate([jnp.arange(dense, dtype=jnp.int32), layer_map]), list_maps)

    if dense >= config.num_layers:
        return identity_plan(layer_similarity.shape[0], *list_similarity.shape[1:3])
    return jax.vmap(plan_row)(layer_similarity, list_similarity)


def choose_sources(caught: Float[Array, "n n"], num_sources: int) -> Int[Array, "n"]:
    """The unit that each unit copies, by greedy facility location; the `num_sources` computed units copy themselves.

    The first unit is a source. Each round then adds the unit that most raises the sum, over all units, of what a unit
    catches from its best source at or below it; on ties the lower unit. In the end each unit copies its best source.

        # caught, lower triangle: [1], [.9, 1], [.2, .3, 1], [0, 0, .8, 1]
        # 2 sources: 0, then 2 (.8 more for itself, .8 for 3)  -> [0, 0, 2, 2]

    Args:
        caught: what unit i catches with the list of unit j; only j <= i counts.
        num_sources: how many units are computed, at least 1.
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


def find_units_plan(
    caught: Float[Array, "B U U"], *, config: ModelConfig, settings: HShareSettings, search: PlanSearch
) -> Source:
    """Each row's plan in which any list may copy any lower list. It is chosen to lose little attention.

    Dense layers have no lists to copy. A row without probes has zeros everywhere, and gets the identity plan.
    """
    L, J = config.num_layers, settings.num_lists(config)
    identity = identity_plan(1, L, J)[0]
    first, num_sources = settings.num_dense * J, search.num_computed_lists(settings, config)
    if not search.shares_lists(settings, config):
        return jnp.tile(identity, (caught.shape[0], 1, 1))

    def plan_row(row: Array) -> Array:
        units = first + choose_sources(row[first:, first:], num_sources)
        plan = jnp.concatenate([identity.reshape(-1)[:first], units]).reshape(L, J)
        return jnp.where(row.max() > 0, plan, identity)

    return jax.vmap(plan_row)(caught)


def choose_anchors(caught: Float[Array, "n n"], num_anchors: int) -> Int[Array, "n"]:
    """The unit that each unit copies: the nearest anchor at or below it, with the best `num_anchors` anchors.

    Dynamic programming over the ends of the stretches that one anchor serves finds the anchors with the greatest sum of
    caught[i, anchor of i]; on ties the lower anchors. The first unit is an anchor.

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

    # best[e]: the most that units 0 to e - 1 catch in as many stretches as were added; 0 stretches catch nothing.
    empty = jnp.where(ends == 0, 0.0, -jnp.inf)
    _, last_anchors = lax.scan(add_stretch, empty, length=num_anchors)

    def mark(end: Int[Array, ""], last: Int[Array, "ends"]) -> tuple[Int[Array, ""], Int[Array, ""]]:
        return last[end], last[end]

    _, anchors = lax.scan(mark, jnp.int32(n), last_anchors, reverse=True)
    return jnp.where(anchors[None, :] <= unit[:, None], anchors[None, :], 0).max(axis=1)


def find_anchor_plan(
    caught: Float[Array, "B U U"], *, config: ModelConfig, settings: HShareSettings, search: PlanSearch
) -> Source:
    """Each row's plan in which a layer copies all its lists, head for head, from the anchor layer at or below it.

    A row without probes has zeros everywhere, and gets the identity plan.
    """
    L, J, dense = config.num_layers, settings.num_lists(config), settings.num_dense
    identity = identity_plan(1, L, J)[0]
    num_anchors = settings.num_sparse_layers(config) - search.num_shared_layers(settings, config)

    def plan_row(row: Array) -> Array:
        of_layers = jnp.einsum("LJMJ->LM", row.reshape(L, J, L, J))
        anchors = dense + choose_anchors(of_layers[dense:, dense:], num_anchors)
        layers = jnp.concatenate([jnp.arange(dense, dtype=jnp.int32), anchors])
        return jnp.where(row.max() > 0, compose(layers, jnp.tile(jnp.arange(J, dtype=jnp.int32), (L, 1))), identity)

    if dense >= L:
        return jnp.tile(identity, (caught.shape[0], 1, 1))
    return jax.vmap(plan_row)(caught)
