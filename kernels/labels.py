"""Labels: the few channels of each cached key that scores are taken on, quantised: a fraction of what attention reads.

The trick is Double Sparsity's (arXiv 2408.07092, section 3), which HShare builds on.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int, UInt


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels of one layer's cache. Slots lie along the last axis, so that scoring streams over them.

    A quantised label is offset + step * code, with one offset and step for each token and head (asymmetric, from the
    least to the greatest of its channels). Two 4-bit codes share a byte: channel r < half lies in the low bits of byte
    r, channel half + r in its high bits, half being R / 2 rounded up.
    """

    codes: Array  # [B, K, R, S] uint8, or [B, K, half, S] where two share a byte; the keys' dtype where not quantised
    scales: Array | None  # [B, K, 2, S] in the keys' dtype: offset, step; None where not quantised


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


def take_channels(x: Float[Array, "B K rows H"], channels: Int[Array, "B K R"]) -> Float[Array, "B K rows R"]:
    """Returns the label channels of queries or keys."""
    return jnp.take_along_axis(x, channels[:, :, None, :], axis=-1)


def make_labels(keys: Float[Array, "B K S H"], channels: Int[Array, "B K R"], bits: int | None) -> Labels:
    """Returns the labels of keys: of a whole cache, or of the one token that is about to be appended."""
    labels = take_channels(keys, channels)
    if bits is None:
        return Labels(labels.swapaxes(2, 3), None)
    codes, offset, step = quantise(labels, bits, keys.dtype)
    codes = codes.swapaxes(2, 3)
    if bits == 4:
        half = -(-codes.shape[2] // 2)
        high = jnp.pad(codes[:, :, half:], ((0, 0), (0, 0), (0, 2 * half - codes.shape[2]), (0, 0)))
        codes = codes[:, :, :half] | high << 4
    return Labels(codes, jnp.stack([offset, step], axis=2))


def quantise(
    x: Float[Array, "*rows R"], bits: int, dtype: jnp.dtype
) -> tuple[UInt[Array, "*rows R"], Float[Array, "*rows"], Float[Array, "*rows"]]:
    """Returns (codes uint8, offset, step) with x close to offset + step * code; offset and step are kept in `dtype`."""
    x = x.astype(jnp.float32)
    offset = x.min(axis=-1).astype(dtype)
    step = ((x.max(axis=-1) - offset.astype(jnp.float32)) / (2**bits - 1)).astype(dtype)
    wide_step = step.astype(jnp.float32)[..., None]
    codes = jnp.round((x - offset.astype(jnp.float32)[..., None]) / jnp.where(wide_step > 0, wide_step, 1))
    return jnp.clip(codes, 0, 2**bits - 1).astype(jnp.uint8), offset, step


def label_query(q: Float[Array, "B N H"], channels: Int[Array, "B K R"], bits: int | None) -> Float[Array, "B N R"]:
    """Returns the queries that labels are scored with: their label channels, quantised as the labels are, / sqrt(H).

    That is attention's own scale, so that softmaxed scores estimate its weights. (The published code divides by
    sqrt(R); it makes no difference to the order within one head.)
    """
    (B, N, H), (_, K, R) = q.shape, channels.shape
    query = take_channels(q.reshape(B, K, N // K, H), channels)
    if bits is not None:
        codes, offset, step = quantise(query, bits, jnp.dtype(jnp.float32))
        query = offset[..., None] + step[..., None] * codes
    return query.reshape(B, N, R).astype(jnp.float32) * H**-0.5


def score_labels(
    q: Float[Array, "B N H"], labels: Labels, channels: Int[Array, "B K R"], bits: int | None
) -> Float[Array, "B N S"]:
    """Returns q . k / sqrt(H) on the label channels, float32, for every slot of the cache, filled or not."""
    (B, K, R), N = channels.shape, q.shape[1]
    query = label_query(q, channels, bits).reshape(B, K, N // K, R)
    if bits is None or labels.scales is None:
        return _score_channels(query, labels.codes).reshape(B, N, -1)
    unpacked = labels.codes
    if bits == 4:
        unpacked = jnp.concatenate([labels.codes & 15, labels.codes >> 4], axis=2)[:, :, :R]
    offset, step = jnp.split(labels.scales.astype(jnp.float32), 2, axis=2)
    # q . (offset + step * code) = offset * sum(q) + step * (q . code)
    scores = _score_channels(query, unpacked.astype(jnp.float32)) * step + offset * query.sum(axis=-1)[..., None]
    return scores.reshape(B, N, -1)


def _score_channels(query: Float[Array, "B K G R"], labels: Float[Array, "B K R S"]) -> Float[Array, "B K G S"]:
    return lax.dot_general(query, labels, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def score_keys(q: Float[Array, "B N H"], keys: Float[Array, "B K S H"]) -> Float[Array, "B N S"]:
    """Returns q . k / sqrt(H) on all channels, float32, for every slot of the cache: what labels approximate."""
    B, K, S, H = keys.shape
    N = q.shape[1]
    scores = lax.dot_general(
        q.reshape(B, K, N // K, H), keys, (((3,), (3,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32
    )
    return scores.reshape(B, N, S) * H**-0.5
