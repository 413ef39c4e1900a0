"""Critical tokens: which slots compete for a list, and the choice among them."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from hshare_jax.kernels.api import select_by_keys, select_by_labels
from hshare_jax.kernels.int8_rows import Rows
from hshare_jax.kernels.labels import Labels, label_query
from hshare_jax.methods.hshare.settings import HShareSettings
from hshare_jax.shapes import Lists, Source


def choose_lists(
    lists: Lists,
    layer: int,
    q: Float[Array, "B N H"],
    keys: Rows,
    labels: Labels | None,
    channels: Int[Array, "B K R"],
    source: Source,
    is_due: Bool[Array, "B"],
    lengths: Int[Array, "B"],
    *,
    settings: HShareSettings,
    window: int | None,
    impl: str = "auto",
) -> Lists:
    """The lists of all layers, after one layer's queries chose: the best slots between the sinks and the recent tokens.

        # length 8, 1 sink, 2 recent:  slots 0 | 1 2 3 4 5 | 6 7  -> only 1 to 5 compete

    Only the lists that the plan computes are chosen, and only in rows that are due. With `HShareSettings.pool` they
    are pools, which are longer.

    Args:
        lists: the lists, or the pools, of all layers.
        layer: the layer whose lists are chosen.
        q: one rotated query per head. It stands at position length - 1 of its row.
        keys: the layer's cache, which is read only without labels.
        labels: the labels of that cache; None scores whole keys.
        channels: the layer's label channels.
        source: the plan.
        is_due: the rows that choose.
        lengths: tokens of each row, including the token of the query.
        settings: how many tokens a list takes, and where they may lie.
        window: the layer's sliding window; tokens before it do not compete.
        impl: as for `kernels.api`.
    """
    first, last = candidate_range(lengths, settings, window)
    competing = source, is_due, first, last, num_in_pool(lengths, settings)
    if labels is None:
        return select_by_keys(lists, layer, q, keys, *competing, dilate=settings.dilates, impl=impl)
    query = label_query(q, channels, settings.label_bits)
    return select_by_labels(lists, layer, query, labels, *competing, dilate=settings.dilates, impl=impl)


def candidate_range(
    lengths: Int[Array, "B"], settings: HShareSettings, window: int | None
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """The slots [first, last) that compete: those between the sinks and the recent tokens, inside the window."""
    first = jnp.full_like(lengths, settings.num_sinks)
    if window is not None:
        first = jnp.maximum(first, lengths - window)
    return first, lengths - settings.num_recent


def num_in_pool(lengths: Int[Array, "B"], settings: HShareSettings) -> Int[Array, "B"] | None:
    """How many tokens each row may keep in a pool under `budget_ratio`; None where no ratio is set."""
    allowed = num_critical_in_budget(lengths, settings)
    return None if allowed is None else allowed * settings.pool


def num_critical_in_budget(lengths: Int[Array, "B"], settings: HShareSettings) -> Int[Array, "B"] | None:
    """How many critical tokens each row may list under `budget_ratio`; None where no ratio is set."""
    if settings.budget_ratio is None:
        return None
    allowed = lengths * settings.budget_ratio.numerator // settings.budget_ratio.denominator
    return jnp.clip(allowed - settings.num_sinks - settings.num_recent, 0, settings.num_critical)
