"""Labels: the few channels of each cached key that scores are taken on, a fraction of what attention reads.

The trick is Double Sparsity's (arXiv 2408.07092, section 3), which HShare builds on.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int


def choose_channels(
    probes: Float[Array, "B P N H"], keys: Float[Array, "B K S H"], lengths: Int[Array, "B"], num_channels: int
) -> Int[Array, "B K R"]:
    """Returns the channels, ascending, of the largest mean |q x k| over a group's probe queries and cached keys.

    The mean over all pairs of a probe and a key factors into the two means, so no pair is ever formed. Probes that a
    row lacks are zero; a row that lacks all of them, its prompt being shorter than the budget, goes by its keys alone.
    """
    B, K, S, H = keys.shape
    is_filled = jnp.arange(S)[None, None, :, None] < lengths[:, None, None, None]
    key_size = jnp.where(is_filled, jnp.abs(keys.astype(jnp.float32)), 0).sum(axis=2)
    query_size = jnp.abs(probes.astype(jnp.float32)).sum(axis=1).reshape(B, K, -1, H).sum(axis=2)
    query_size = jnp.where(query_size.max(axis=-1, keepdims=True) > 0, query_size, 1)
    return jnp.sort(lax.top_k(key_size * query_size, num_channels)[1], axis=-1)


def take_channels(x: Float[Array, "B K rows H"], channels: Int[Array, "B K R"]) -> Float[Array, "B K rows R"]:
    """Returns the label channels of queries or keys."""
    return jnp.take_along_axis(x, channels[:, :, None, :], axis=-1)


def score_labels(
    q: Float[Array, "B N H"], labels: Float[Array, "B K S R"], channels: Int[Array, "B K R"]
) -> Float[Array, "B N S"]:
    """Returns q . k / sqrt(R) on the label channels, float32, for every slot of the cache, filled or not."""
    B, K, S, R = labels.shape
    N, H = q.shape[1:]
    query_labels = take_channels(q.reshape(B, K, N // K, H), channels)
    scores = lax.dot_general(labels, query_labels, (((3,), (3,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
    return scores.swapaxes(2, 3).reshape(B, N, S) * R**-0.5
