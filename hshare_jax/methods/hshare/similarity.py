"""Similarity: how well the critical tokens of one layer or list would serve another, measured on the prompt."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from hshare_jax.kernels.labels import Labels, score_keys, score_labels
from hshare_jax.kernels.masked_softmax import softmax_over
from hshare_jax.methods.hshare.critical_tokens import find_critical_tokens
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.models.config import ModelConfig
from hshare_jax.shapes import Similarity

MARKS = 2**22  # lists times slots whose marks are held at once: as many probes are taken together


def probe_positions(
    starts: Int[Array, "B"], lengths: Int[Array, "B"], config: HShareSettings, num_probes: int
) -> tuple[Int[Array, "B P"], Bool[Array, "B P"]]:
    """Returns (positions, is_probe): the prompt queries that similarity is measured on, spread evenly over each row.

    A probe stands no earlier than `HShareSettings.first_probe`, and only the tokens of this prefill, at [start, length),
    can be probes. A row with fewer such positions than probes uses each once; one
    without any has no probe and keeps the identity plan. A position that is no probe is -1.
    """
    first = jnp.maximum(starts, config.first_probe)
    count = jnp.maximum(lengths - first, 0)
    used = jnp.minimum(count, num_probes)[:, None]
    index = jnp.arange(num_probes, dtype=jnp.int32)[None, :]
    # index * (count - 1) // gaps, whole and rest apart: the product overflows where 50,000 tokens are all probes.
    gaps = jnp.maximum(used - 1, 1)
    whole, rest = jnp.divmod(count[:, None] - 1, gaps)
    positions = first[:, None] + index * whole + index * rest // gaps
    is_probe = index < used
    return jnp.where(is_probe, positions, -1), is_probe


def measure_similarity(
    probes: tuple[Array, ...],
    keys: tuple[Array, ...],
    labels: tuple[Labels | None, ...],
    channels: Int[Array, "B L K R"],
    positions: Int[Array, "B P"],
    *,
    model: ModelConfig,
    config: HShareSettings,
) -> Similarity:
    """Returns what the plan is found from: `measure_overlap` for the published plan, `measure_mass` for the others.

    Args:
        probes: L x [B, P, N, H], rotated queries.
        keys: KV layers x [B, K, S, H], the cache.
        labels: of the keys that sparse layers use; None elsewhere, and everywhere with exact scoring.
        channels: the label channels of every layer.
        positions: where the probes stand; negative where there is none.
        model, config: what is measured.
    """
    measure = measure_overlap if config.plan == "published" else measure_mass
    return measure(probes, keys, labels, channels, positions, model=model, config=config)


def measure_overlap(
    probes: tuple[Array, ...],
    keys: tuple[Array, ...],
    labels: tuple[Labels | None, ...],
    channels: Int[Array, "B L K R"],
    positions: Int[Array, "B P"],
    *,
    model: ModelConfig,
    config: HShareSettings,
) -> tuple[Float[Array, "B L L"], Float[Array, "B L J J"]]:
    """Returns (similarity of layers, of the lists within each layer): mean over probes of |A and B| / num_critical.

    Only the chosen tokens count, not sinks and recent ones; that of layers is pooled over their lists (HShare, ICLR
    2025, section 4.2). Dense layers, which have no lists, are similar to none. Arguments are those of
    `measure_similarity`.
    """

    def overlap(lists: Array, queries: tuple[Array, ...], lengths: Array) -> tuple[Array, Array]:
        return jnp.einsum("LPBJS,MPBJS->BLM", lists, lists), jnp.einsum("LPBJS,LPBIS->BLJI", lists, lists)

    of_layers, of_lists = _sum_over_probes(overlap, probes, keys, labels, channels, positions, model, config)
    # Divided only now: sums of whole numbers are exact, so equal overlaps are equal numbers and ties break by order.
    most = config.num_critical * jnp.maximum((positions >= 0).sum(axis=1), 1)
    J = config.num_lists(model)
    return of_layers / (most * J)[:, None, None], of_lists / most[:, None, None, None]


def measure_mass(
    probes: tuple[Array, ...],
    keys: tuple[Array, ...],
    labels: tuple[Labels | None, ...],
    channels: Int[Array, "B L K R"],
    positions: Int[Array, "B P"],
    *,
    model: ModelConfig,
    config: HShareSettings,
) -> Float[Array, "B U U"]:
    """Returns how much of list i's attention the tokens of list j would catch, mean over probes.

    Entry [i, j] is the true attention mass (softmax over all that the query sees, on all channels) of the heads that
    list i serves, summed, on the tokens of list j. Sinks and recent tokens are read anyway and not counted: so a head
    that looks at little else weighs little. U = L * J lists, by flat id (layer * J + list). Dense layers, which have no
    lists, have zeros. Arguments are those of `measure_similarity`.
    """
    J, S = config.num_lists(model), keys[0].shape[2]
    L, B, N = model.num_layers, positions.shape[0], model.num_heads
    slots = jnp.arange(S)[None, :]

    def mass_of(layer: int, q: Array, lengths: Array) -> Array:
        seen, window = model.sees(layer, lengths)
        is_visible = slots < seen[:, None]
        if window is not None:
            is_visible &= slots >= seen[:, None] - window
        scores = score_keys(q, keys[model.kv_index(layer)])
        return softmax_over(is_visible, scores).reshape(B, J, N // J, S).sum(axis=2)

    def caught(lists: Array, queries: tuple[Array, ...], lengths: Array) -> Array:
        of_probes = jax.vmap(mass_of, in_axes=(None, 0, 0))
        mass = jnp.stack([of_probes(layer, q, lengths) for layer, q in enumerate(queries)])
        is_sparse = jnp.arange(L) >= config.dense_layers
        mass = jnp.where(is_sparse[:, None, None, None, None], mass, 0)
        mass, lists = (jnp.moveaxis(array, 0, 2).reshape(-1, B, L * J, S) for array in (mass, lists))
        return jnp.einsum("PBIS,PBJS->PBIJ", mass, lists).sum(axis=0)

    total = _sum_over_probes(caught, probes, keys, labels, channels, positions, model, config)
    return total / jnp.maximum((positions >= 0).sum(axis=1), 1)[:, None, None]


def _sum_over_probes(
    measure: Callable[[Array, tuple[Array, ...], Array], Array | tuple[Array, ...]],
    probes: tuple[Array, ...],
    keys: tuple[Array, ...],
    labels: tuple[Labels | None, ...],
    channels: Array,
    positions: Array,
    model: ModelConfig,
    config: HShareSettings,
):
    """Returns the sum over each row's probes of measure(lists as 0/1 marks [L, P, B, J, S], queries, lengths [P, B]).

    Probes are taken a group at a time: memory holds a mark for each list and slot of a group, never for each pair of
    tokens.
    """
    (B, P), S, J = positions.shape, keys[0].shape[2], config.num_lists(model)
    rows, lists = jnp.arange(B)[:, None, None], jnp.arange(J)[None, :, None]
    windows = jnp.asarray([S if window is None else window for window in model.windows], jnp.int32)
    is_sparse = jnp.arange(model.num_layers) >= config.dense_layers

    def mark(scores: Array, window: Array, is_sparse: Array, position: Array) -> Array:
        tokens = find_critical_tokens(scores, position + 1, num_lists=J, config=config, window=window)
        # EMPTY is written to a slot of its own, past the end; so is all of what is no probe.
        is_marked = (tokens >= 0) & (position >= 0)[:, None, None] & is_sparse
        return jnp.zeros((B, J, S + 1), jnp.float32).at[rows, lists, jnp.where(is_marked, tokens, S)].set(1)[..., :S]

    mark_group = jax.vmap(jax.vmap(mark, in_axes=(0, None, None, 0)), in_axes=(0, 0, 0, None))

    def score(layer: int, queries: Array) -> Array:
        index = model.kv_index(layer)
        label = labels[index]
        if label is None:
            return jax.vmap(score_keys, in_axes=(0, None))(queries, keys[index])
        return jax.vmap(lambda q: score_labels(q, label, channels[:, layer], config.label_bits))(queries)

    def measure_group(group: tuple[tuple[Array, ...], Array]) -> Array | tuple[Array, ...]:
        queries, position = group
        scores = jnp.stack([score(layer, q) for layer, q in enumerate(queries)])  # [L, G, B, N, S]
        return measure(mark_group(scores, windows, is_sparse, position), queries, position + 1)

    def add(total, group: tuple[tuple[Array, ...], Array]):
        return jax.tree.map(jnp.add, total, measure_group(group)), None

    G = max(1, min(P, MARKS // (model.num_layers * B * J * S)))
    groups = jax.tree.map(lambda array: _in_groups(array, G), (probes, positions))
    shapes = jax.eval_shape(measure_group, jax.tree.map(lambda array: array[0], groups))
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return lax.scan(add, zeros, groups)[0]


def _in_groups(array: Array, size: int) -> Array:
    """Returns [B, P, ...] as [groups, size, B, ...]; what is missing to a whole group is no probe."""
    array = jnp.pad(array, [(0, 0), (0, -array.shape[1] % size), *[(0, 0)] * (array.ndim - 2)], constant_values=-1)
    return jnp.moveaxis(array.reshape(array.shape[0], -1, size, *array.shape[2:]), 0, 2)
