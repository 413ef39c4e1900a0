"""Critical tokens: which slots compete for a list, and which of them the scores of a query choose."""

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
    config: HShareSettings,
    window: int | Int[Array, ""] | None = None,
) -> Int[Array, "B J C"]:
    """Returns the lists that these scores choose: the best between the sinks and the recent tokens, ascending.

        # length 8, 1 sink, 2 recent:  slots 0 | 1 2 3 4 5 | 6 7  -> only 1 to 5 compete

    Args:
        scores: of one query per head, at position length - 1 of its row, with every slot.
        lengths: tokens of each row up to and including the query's own.
        num_lists: J, either K (a list serves a group) or N.
        window: the layer's sliding window; tokens before it do not compete.
    """
    first, last = candidate_range(lengths, config, window)
    return choose_tokens(
        scores, first, last, num_critical_in_budget(lengths, config),
        num_lists=num_lists, num_critical=config.num_critical, dilate=config.dilates,
    )  # fmt: skip


def candidate_range(
    lengths: Int[Array, "B"], config: HShareSettings, window: int | Int[Array, ""] | None
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Returns (first, last): the slots [first, last) compete, those between sinks and recent tokens in the window."""
    first = jnp.full_like(lengths, config.num_sinks)
    if window is not None:
        first = jnp.maximum(first, lengths - window)
    return first, lengths - config.num_recent


def num_critical_in_budget(lengths: Int[Array, "B"], config: HShareSettings) -> Int[Array, "B"] | None:
    """Returns how many critical tokens each row may list under `budget_ratio`; None where there is no such bound."""
    if config.budget_ratio is None:
        return None
    allowed = lengths * config.budget_ratio.numerator // config.budget_ratio.denominator
    return jnp.clip(allowed - config.num_sinks - config.num_recent, 0, config.num_critical)
