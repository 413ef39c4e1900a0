"""The choice of tokens: from the scores of query heads to the list of cached tokens that they read."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from hshare_jax.kernels.masked_softmax import softmax_over
from hshare_jax.kernels.top_k import select_tokens


# Jitted, so that all layers of a step share one trace.
@functools.partial(jax.jit, static_argnames=("num_lists", "num_critical", "dilate"))
def choose_tokens(
    scores: Float[Array, "B N S"],
    first: Int[Array, "B"],
    last: Int[Array, "B"],
    num_allowed: Int[Array, "B"] | None,
    *,
    num_lists: int,
    num_critical: int,
    dilate: bool,
) -> Int[Array, "B J C"]:
    """The lists that these scores choose: the slots of the highest weights, ascending, padded with EMPTY.

    The weights come from `weigh_tokens`. Ties go to the lower slot.

    Args:
        scores: one score per query head and slot, of slots that compete and of slots that do not.
        first, last: the slots [first, last) of each row compete.
        num_allowed: how many slots a list of each row may hold; None allows `num_critical`.
        num_lists: J, either K (a list serves a group of query heads) or N (a list serves one query head).
        num_critical: C, the places of a list.
        dilate: whether a slot weighs at least as much as the slot before it.
    """
    weights = weigh_tokens(scores, first, last, num_lists=num_lists, dilate=dilate)
    return select_tokens(weights, mark_candidates(first, last, scores.shape[-1]), num_critical, num_allowed)


def weigh_tokens(
    scores: Float[Array, "B N S"], first: Int[Array, "B"], last: Int[Array, "B"], *, num_lists: int, dilate: bool
) -> Float[Array, "B J S"]:
    """The weights by which each list chooses its tokens. See `choose_tokens` for the arguments."""
    is_candidate = mark_candidates(first, last, scores.shape[-1])
    pooled = pool_scores(scores, is_candidate, num_lists)
    return dilate_weights(jnp.where(is_candidate[:, None, :], pooled, -jnp.inf)) if dilate else pooled


def mark_candidates(first: Int[Array, "B"], last: Int[Array, "B"], num_slots: int) -> Bool[Array, "B S"]:
    """Which slots compete: those in [first, last)."""
    slots = jnp.arange(num_slots)[None, :]
    return (slots >= first[:, None]) & (slots < last[:, None])


def pool_scores(
    scores: Float[Array, "B N S"], is_candidate: Bool[Array, "B S"], num_lists: int
) -> Float[Array, "B J S"]:
    """One weight per list and slot. The heads of a group add up their softmaxed scores.

    Scores are softmaxed first, so that a head with large queries does not outvote the other heads of the group. A list
    that serves a single head keeps the head's scores.
    """
    B, N, S = scores.shape
    if num_lists == N:
        return scores
    weights = softmax_over(is_candidate, scores)
    return weights.reshape(B, num_lists, N // num_lists, S).sum(axis=2)


def dilate_weights(weights: Float[Array, "B J S"]) -> Float[Array, "B J S"]:
    """Weights in which each slot weighs at least as much as the slot before it.

    The list serves later steps too. A later step that goes on copying a passage wants the token after the one that this
    step wants.
    """
    before = jnp.pad(weights[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=-jnp.inf)
    return jnp.maximum(weights, before)
