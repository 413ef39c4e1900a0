"""Label channels: the few channels of a head whose products with the prompt's queries are largest.

Double Sparsity calls them outlier channels (arXiv 2408.07092, section 3.1).
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from hshare_jax.kernels.int8_rows import Rows, row_floats
from hshare_jax.models.config import ModelConfig


def choose_channels(
    query_size: Float[Array, "B N H"], keys: Rows, lengths: Int[Array, "B"], num_channels: int
) -> Int[Array, "B K R"]:
    """The channels with the largest mean |q x k| over a group's queries and the cached keys, ascending."""
    statistic = channel_statistic(query_size, keys, lengths)
    return jnp.sort(lax.top_k(statistic, num_channels)[1], axis=-1)


def channel_statistic(query_size: Float[Array, "B N H"], keys: Rows, lengths: Int[Array, "B"]) -> Float[Array, "B K H"]:
    """Mean |q x k| over all pairs of a prompt query and a cached key, up to a factor for each row.

    The mean over all pairs is the product of the two means, so no pair is ever formed. The heads of a group add up.

    Args:
        query_size: sum of |q|, after RoPE, over a prompt's tokens.
        keys: one layer's cache.
        lengths: cached tokens of each row.
    """
    B, K, S, H = keys.shape
    is_filled = jnp.arange(S)[None, None, :, None] < lengths[:, None, None, None]
    key_size = jnp.where(is_filled, jnp.abs(row_floats(keys).astype(jnp.float32)), 0).sum(axis=2)
    return key_size * query_size.reshape(B, K, -1, H).sum(axis=2)


def check_channels(channels: Array | np.ndarray, config: ModelConfig, num_channels: int) -> Int[np.ndarray, "L K R"]:
    """The best `num_channels` of every kv head, ascending, from channels that are given with the best first.

    Raises:
        ValueError: channels that cannot be this model's.
    """
    given = np.asarray(channels)
    expected = (config.num_layers, config.num_kv_heads)
    if given.shape[:2] != expected or given.ndim != 3 or given.shape[2] < num_channels:
        raise ValueError(
            f"channels has shape {list(given.shape)}; this model needs {list(expected)} heads with at least "
            f"label_channels={num_channels} channels each"
        )
    best = np.sort(given[:, :, :num_channels], axis=-1)
    if best.min() < 0 or best.max() >= config.head_dim or (np.diff(best, axis=-1) == 0).any():
        raise ValueError(f"channels must be different numbers in [0, head_dim={config.head_dim}) for every head")
    return best.astype(np.int32)
