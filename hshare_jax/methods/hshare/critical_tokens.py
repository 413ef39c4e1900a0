"""Critical tokens: which slots compete for a list, and which slots the scores of a query choose."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from hshare_jax.kernels.choose_tokens import choose_tokens
from hshare_jax.methods.hshare.settings import HShareSettings


def find_critical_tokens(
    scores: Float[Array, "B N S"],
    lengths: Int[Array, "B"],
    *,
    num_lists: int,
    settings: HShareSettings,
    window: int | Int[Array, ""] | None = None,
) -> Int[Array, "B J W"]:
    """The lists that these scores choose: the best slots between the sinks and the recent tokens, ascending.

    With `HShareSettings.pool` they are pools, which are longer.

        # length 8, 1 sink, 2 recent:  slots 0 | 1 2 3 4 5 | 6 7  -> only 1 to 5 compete

    Args:
        scores: of one query per head with every slot. The query stands at position length - 1 of the row.
        lengths: tokens of each row, including the token of the query.
        num_lists: J, either K (a list serves a group of query heads) or N.
        settings: how many tokens a list takes, and where they may lie.
        window: the layer's sliding window; tokens before it do not compete.
    """
    first, last = candidate_range(lengths, settings, window)
    return choose_tokens(
        scores, first, last, num_in_pool(lengths, settings),
        num_lists=num_lists, num_critical=settings.pool_size, dilate=settings.dilates,
    )  # fmt: skip


def candidate_range(
    lengths: Int[Array, "B"], settings: HShareSettings, window: int | Int[Array, ""] | None
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
