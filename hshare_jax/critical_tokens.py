"""Critical tokens: from label scores to the list of cached tokens that a head reads."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from hshare_jax.config import HShareConfig
from hshare_jax.kernels.reference import EMPTY
from hshare_jax.labels import score_labels


def find_critical_tokens(
    q: Float[Array, "B N H"],
    labels: Float[Array, "B K S R"],
    channels: Int[Array, "B K R"],
    lengths: Int[Array, "B"],
    *,
    num_lists: int,
    config: HShareConfig,
    window: int | Int[Array, ""] | None = None,
) -> Int[Array, "B J C"]:
    """Returns the lists that these queries choose: the best label scores between the sinks and the recent tokens.

        # length 8, 1 sink, 2 recent:  slots 0 | 1 2 3 4 5 | 6 7  -> only 1 to 5 compete

    Args:
        q: one query per head, at position length - 1 of its row.
        lengths: tokens of each row up to and including the query's own.
        num_lists: J, either K (a list serves a group) or N.
        window: the layer's sliding window; tokens before it do not compete.
    """
    slots = jnp.arange(labels.shape[2])[None, :]
    is_candidate = (slots >= config.num_sinks) & (slots < lengths[:, None] - config.num_recent)
    if window is not None:
        is_candidate &= slots >= lengths[:, None] - window
    scores = pool_scores(score_labels(q, labels, channels), is_candidate, num_lists)
    return select_tokens(scores, is_candidate, config.num_critical)


def pool_scores(
    scores: Float[Array, "B N S"], is_candidate: Bool[Array, "B S"], num_lists: int
) -> Float[Array, "B J S"]:
    """Returns one score per list: heads of a group add up softmaxed scores, so that none outvotes by its norm."""
    B, N, S = scores.shape
    if num_lists == N:
        return scores
    weights = jax.nn.softmax(jnp.where(is_candidate[:, None, :], scores, jnp.finfo(scores.dtype).min), axis=-1)
    return weights.reshape(B, num_lists, N // num_lists, S).sum(axis=2)


def select_tokens(
    scores: Float[Array, "B J S"], is_candidate: Bool[Array, "B S"], num_critical: int
) -> Int[Array, "B J C"]:
    """Returns the slots of the `num_critical` highest scores, ascending; ties go to the lower slot.

    With fewer candidates all of them are listed and the rest is EMPTY.
    """
    B, J, S = scores.shape
    best, slots = lax.top_k(jnp.where(is_candidate[:, None, :], scores, -jnp.inf), min(num_critical, S))
    slots = jnp.sort(jnp.where(best > -jnp.inf, slots, S), axis=-1)
    slots = jnp.pad(slots, ((0, 0), (0, 0), (0, num_critical - slots.shape[-1])), constant_values=S)
    return jnp.where(slots < S, slots, EMPTY).astype(jnp.int32)
