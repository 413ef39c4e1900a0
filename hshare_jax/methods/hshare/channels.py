"""Label channels: the few channels of a head whose products with the prompt's queries are largest."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int


def choose_channels(
    query_size: Float[Array, "B N H"], keys: Float[Array, "B K S H"], lengths: Int[Array, "B"], num_channels: int
) -> Int[Array, "B K R"]:
    """Returns the channels, ascending, of the largest mean |q x k| over a group's queries and cached keys."""
    statistic = channel_statistic(query_size, keys, lengths)
    return jnp.sort(lax.top_k(statistic, num_channels)[1], axis=-1)


def channel_statistic(
    query_size: Float[Array, "B N H"], keys: Float[Array, "B K S H"], lengths: Int[Array, "B"]
) -> Float[Array, "B K H"]:
    """Returns, up to a factor for each row, mean |q x k| over all pairs of a prompt query and a cached key.

    The mean over all pairs factors into the two means, so no pair is ever formed. Heads of a group add up.

    Args:
        query_size: the sum of |q|, after RoPE, over a prompt's tokens.
        keys: one layer's cache.
        lengths: cached tokens of each row.
    """
    B, K, S, H = keys.shape
    is_filled = jnp.arange(S)[None, None, :, None] < lengths[:, None, None, None]
    key_size = jnp.where(is_filled, jnp.abs(keys.astype(jnp.float32)), 0).sum(axis=2)
    return key_size * query_size.reshape(B, K, -1, H).sum(axis=2)
