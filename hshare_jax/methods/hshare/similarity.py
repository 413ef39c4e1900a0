"""Similarity: how well the critical tokens of one layer or list would serve another one, measured on the prompt."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from hshare_jax.kernels.labels import Labels, score_keys
from hshare_jax.kernels.masked_softmax import softmax_over
from hshare_jax.methods.base import PromptQueries, identity_plan, mark_dense
from hshare_jax.methods.hshare.critical_tokens import choose_lists
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.models.config import ModelConfig
from hshare_jax.shapes import EMPTY, Similarity

MAX_MARKS = 2**22  # marks (one for each list and slot) in memory at once; it bounds how many probes are taken together


class LabelledPrompt(NamedTuple):
    """A prompt's probe queries, and what they are scored against."""

    queries: PromptQueries
    keys: tuple[Any, ...]  # KV layers x [B, K, S, H], the cache
    # KV layers: labels of the keys that sparse layers use; None elsewhere, and everywhere under exact scoring.
    labels: tuple[Labels | None, ...]
    channels: Int[Array, "B L K R"]  # label channels of every layer
    listed: Int[Array, "P L B J C"] | None = None  # from `list_probes`; None chooses the probes' lists when asked


def probe_positions(
    starts: Int[Array, "B"], lengths: Int[Array, "B"], settings: HShareSettings, num_probes: int
) -> Int[Array, "B P"]:
    """Positions of the prompt queries that a plan and tails are found from, the last ones of each row.

    Decoding goes on where the prompt ends, and its queries are most like the prompt's last ones. A probe stands no
    earlier than `HShareSettings.first_probe`. Only the tokens of this prefill, at [start, length), can be probes. A row
    without any such position has no probe and keeps the identity plan. A position that is no probe is -1.
    """
    count = jnp.maximum(lengths - jnp.maximum(starts, settings.first_probe), 0)
    used = jnp.minimum(count, num_probes)[:, None]
    index = jnp.arange(num_probes, dtype=jnp.int32)[None, :]
    return jnp.where(index < used, lengths[:, None] - used + index, -1)


def measure_overlap(
    prompt: LabelledPrompt, *, config: ModelConfig, settings: HShareSettings, impl: str = "auto"
) -> tuple[Float[Array, "B L L"], Float[Array, "B L J J"]]:
    """The paper's similarity of layers, and of the lists of each layer: mean over probes of |A and B| / num_critical.

    Only chosen tokens count; sinks and recent tokens do not. The similarity of two layers is pooled over their lists
    (HShare, ICLR 2025, section 4.2). Dense layers have no lists and are similar to no layer.
    """

    def overlap(marks: Array, queries: tuple[Array, ...], lengths: Array) -> tuple[Array, Array]:
        return jnp.einsum("LPBJS,MPBJS->BLM", marks, marks), jnp.einsum("LPBJS,LPBIS->BLJI", marks, marks)

    of_layers, of_lists = _sum_over_probes(overlap, prompt, config, settings, impl)
    # Divided only now: sums of whole numbers are exact, so equal overlaps are equal numbers and ties break by order.
    most = settings.pool_size * _num_probes(prompt.queries)
    J = settings.num_lists(config)
    return of_layers / (most * J)[:, None, None], of_lists / most[:, None, None, None]


def measure_mass(
    prompt: LabelledPrompt, *, config: ModelConfig, settings: HShareSettings, impl: str = "auto"
) -> Float[Array, "B U U"]:
    """How much of list i's attention the tokens of list j would catch, the mean over probes.

    Entry [i, j] is the true attention mass (softmax over all that the query sees, on all channels) of the heads that
    list i serves, summed, on the tokens of list j. Sinks and recent tokens do not count, because they are read anyway;
    so a head that looks at little else weighs little. There are U = L * J lists, ordered by flat id (layer * J + list).
    Dense layers have no lists, and zeros here.
    """
    keys = prompt.keys
    J, S = settings.num_lists(config), keys[0].shape[2]
    L, B, N = config.num_layers, prompt.queries.positions.shape[0], config.num_heads

    def mass_of(layer: int, q: Array, lengths: Array) -> Array:
        is_visible = mark_dense(layer, lengths, S, config)
        scores = score_keys(q, keys[config.kv_index(layer)])
        return softmax_over(is_visible, scores).reshape(B, J, N // J, S).sum(axis=2)

    def caught(marks: Array, queries: tuple[Array, ...], lengths: Array) -> Array:
        of_probes = jax.vmap(mass_of, in_axes=(None, 0, 0))
        mass = jnp.stack([of_probes(layer, q, lengths) for layer, q in enumerate(queries)])
        is_sparse = jnp.arange(L) >= settings.num_dense
        mass = jnp.where(is_sparse[:, None, None, None, None], mass, 0)
        mass, marks = (jnp.moveaxis(array, 0, 2).reshape(-1, B, L * J, S) for array in (mass, marks))
        return jnp.einsum("PBIS,PBJS->PBIJ", mass, marks).sum(axis=0)

    total = _sum_over_probes(caught, prompt, config, settings, impl)
    return total / _num_probes(prompt.queries)[:, None, None]


MEASURES: dict[str, Callable[..., Similarity]] = {"overlap": measure_overlap, "mass": measure_mass}


def _num_probes(queries: PromptQueries) -> Int[Array, "B"]:
    return jnp.maximum((queries.positions >= 0).sum(axis=1), 1)


def list_probes(
    prompt: LabelledPrompt, *, config: ModelConfig, settings: HShareSettings, layers: Sequence[int], impl: str = "auto"
) -> Int[Array, "P L B J C"]:
    """The lists that each probe chooses in these layers, EMPTY in the others. P is rounded up to groups of probes."""

    def list_group(group: tuple[tuple[Array, ...], Array]) -> Array:
        queries, positions = group
        return _list_group(queries, positions, prompt, config, settings, layers, impl)

    listed = lax.map(list_group, _group_probes(prompt, config, settings))
    return listed.reshape(-1, *listed.shape[2:])


def _sum_over_probes(
    measure: Callable[[Array, tuple[Array, ...], Array], Array | tuple[Array, ...]],
    prompt: LabelledPrompt,
    config: ModelConfig,
    settings: HShareSettings,
    impl: str,
):
    """Adds up measure(marks [L, P, B, J, S], queries, lengths [P, B]) over each row's probes.

    Probes are taken a group at a time. Memory then holds a mark for each list and slot of one group of probes, never
    for each pair of tokens.
    """
    B, S, J = prompt.queries.positions.shape[0], prompt.keys[0].shape[2], settings.num_lists(config)
    rows, lists = jnp.arange(B)[:, None, None], jnp.arange(J)[None, :, None]

    def mark(tokens: Array) -> Array:
        # EMPTY is written to one more slot past the end.
        return jnp.zeros((B, J, S + 1), jnp.float32).at[rows, lists, jnp.where(tokens < 0, S, tokens)].set(1)[..., :S]

    def measure_group(group: tuple[tuple[Array, ...], Array, Array | None]) -> Array | tuple[Array, ...]:
        queries, position, tokens = group
        if tokens is None:
            layers = range(settings.num_dense, config.num_layers)
            tokens = _list_group(queries, position, prompt, config, settings, layers, impl)
        marks = jax.vmap(jax.vmap(mark))(jnp.swapaxes(tokens, 0, 1))
        return measure(marks, queries, position + 1)

    def add(total, group: tuple[tuple[Array, ...], Array, Array | None]):
        return jax.tree.map(jnp.add, total, measure_group(group)), None

    queries, positions = _group_probes(prompt, config, settings)
    tokens = None if prompt.listed is None else prompt.listed.reshape(*positions.shape[:2], *prompt.listed.shape[1:])
    groups = queries, positions, tokens
    shapes = jax.eval_shape(measure_group, jax.tree.map(lambda array: array[0], groups))
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    return lax.scan(add, zeros, groups)[0]


def _list_group(
    queries: tuple[Array, ...],
    positions: Int[Array, "P B"],
    prompt: LabelledPrompt,
    config: ModelConfig,
    settings: HShareSettings,
    layers: Sequence[int],
    impl: str,
) -> Int[Array, "P L B J C"]:
    """The lists that a group of probes chooses in these layers. All other lists, and those of no probe, are EMPTY."""
    L, J = config.num_layers, settings.num_lists(config)
    empty = jnp.full((L, positions.shape[1], J, settings.pool_size), EMPTY, jnp.int32)
    source = identity_plan(positions.shape[1], L, J)

    def choose(probe: tuple[tuple[Array, ...], Array]) -> Array:
        q, position = probe
        lists = empty
        for layer in layers:
            index = config.kv_index(layer)
            lists = choose_lists(
                lists, layer, q[layer], prompt.keys[index], prompt.labels[index], prompt.channels[:, layer], source,
                position >= 0, position + 1, settings=settings, window=config.windows[layer], impl=impl,
            )  # fmt: skip
        return lists

    return lax.map(choose, (queries, positions))


def _group_probes(
    prompt: LabelledPrompt, config: ModelConfig, settings: HShareSettings
) -> tuple[tuple[Array, ...], Array]:
    """The probes L x [groups, size, B, N, H] and their positions [groups, size, B]."""
    (B, P), S, J = prompt.queries.positions.shape, prompt.keys[0].shape[2], settings.num_lists(config)
    size = max(1, min(P, MAX_MARKS // (config.num_layers * B * J * S)))
    return jax.tree.map(lambda array: _in_groups(array, size), (prompt.queries.probes, prompt.queries.positions))


def _in_groups(array: Array, size: int) -> Array:
    """[B, P, ...] as [groups, size, B, ...]. The last group is filled up with positions that are no probes."""
    array = jnp.pad(array, [(0, 0), (0, -array.shape[1] % size), *[(0, 0)] * (array.ndim - 2)], constant_values=-1)
    return jnp.moveaxis(array.reshape(array.shape[0], -1, size, *array.shape[2:]), 0, 2)
