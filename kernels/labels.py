"""Labels: a few channels of each cached key, quantised. Scores are taken on them instead of on whole keys.

Labels are a fraction of what attention reads. The trick is Double Sparsity's (arXiv 2408.07092, section 3), which
HShare builds on.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int, UInt

from hshare_jax.kernels.int8_rows import Rows, row_floats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels of one layer's cache. The slots lie along the last axis, so that scoring streams over them.

    A quantised label is offset + step * code. Each token and head has one offset and one step, such that the codes span
    the range from the smallest to the greatest of the label's channels. Two 4-bit codes share a byte. With half = R / 2
    rounded up, byte r holds channel r in its low bits and channel half + r in its high bits.
    """

    # [B, K, R, S] uint8; [B, K, half, S] uint8 where two codes share a byte; the keys' dtype if not quantised.
    codes: Array
    scales: Array | None  # [B, K, 2, S] in the keys' dtype: offset, step; None if not quantised

    @property
    def dtype(self) -> jnp.dtype:
        """The keys' dtype."""
        return (self.codes if self.scales is None else self.scales).dtype


def take_channels(x: Float[Array, "B K rows H"], channels: Int[Array, "B K R"]) -> Float[Array, "B K rows R"]:
    """The label channels of queries or keys."""
    return jnp.take_along_axis(x, channels[:, :, None, :], axis=-1)


def make_labels(keys: Float[Array, "B K S H"], channels: Int[Array, "B K R"], bits: int | None) -> Labels:
    """The labels of keys: of a whole cache, or of the one token that is about to be appended.

    Args:
        keys: rotated keys of one layer.
        channels: the label channels of each kv head.
        bits: the size of a code, 4 or 8; None keeps the channels as they are.
    """
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
    """Codes (uint8), offset and step of each row, such that x is close to offset + step * code.

    Offset and step are in `dtype`. The codes are those for the offset and step that `dtype` can hold. XLA multiplies by
    an inverse where many numbers are divided by one. The inverses are written out, so that a compiled program, calls of
    single operations and the native kernel give the same bits.
    """
    x = x.astype(jnp.float32)
    offset = x.min(axis=-1).astype(dtype)
    step = (x.max(axis=-1) - offset.astype(jnp.float32)) * (1 / (2**bits - 1))
    if dtype == jnp.bfloat16:  # else XLA computes the codes for the step before it is rounded
        step = lax.reduce_precision(step, exponent_bits=8, mantissa_bits=7)
    step = step.astype(dtype)
    wide_step = step.astype(jnp.float32)[..., None]
    codes = jnp.round((x - offset.astype(jnp.float32)[..., None]) * (1 / jnp.where(wide_step > 0, wide_step, 1)))
    return jnp.clip(codes, 0, 2**bits - 1).astype(jnp.uint8), offset, step


def label_query(q: Float[Array, "B N H"], channels: Int[Array, "B K R"], bits: int | None) -> Float[Array, "B N R"]:
    """The queries that labels are scored with, in float32: their label channels, quantised as labels are, / sqrt(H).

    sqrt(H) is the scale of attention itself, so that the softmax of the scores estimates attention's weights. The
    published code divides by sqrt(R). Within one head the order of the scores is the same.

    Args:
        q: one rotated query per head.
        channels, bits: as for `make_labels`.
    """
    (B, N, H), (_, K, R) = q.shape, channels.shape
    query = take_channels(q.reshape(B, K, N // K, H), channels)
    if bits is not None:
        codes, offset, step = quantise(query, bits, jnp.dtype(jnp.float32))
        query = offset[..., None] + step[..., None] * codes
    return query.reshape(B, N, R).astype(jnp.float32) * H**-0.5


def score_labels(query: Float[Array, "B N R"], labels: Labels) -> Float[Array, "B N S"]:
    """Scores q . k / sqrt(H) on the label channels, in float32, for every slot of the cache, filled or not.

    Args:
        query: from `label_query`.
        labels: of the layer's cache.
    """
    (B, N, R), K = query.shape, labels.codes.shape[1]
    query = query.reshape(B, K, N // K, R)
    if labels.scales is None:
        return _score_channels(query, labels.codes).reshape(B, N, -1)
    codes = labels.codes
    if codes.shape[2] < R:  # two codes share a byte
        codes = jnp.concatenate([codes & 15, codes >> 4], axis=2)[:, :, :R]
    offset, step = jnp.split(labels.scales.astype(jnp.float32), 2, axis=2)
    # q . (offset + step * code) = offset * sum(q) + step * (q . code)
    scores = _score_channels(query, codes.astype(jnp.float32)) * step + offset * query.sum(axis=-1)[..., None]
    return scores.reshape(B, N, -1)


def _score_channels(query: Float[Array, "B K G R"], labels: Float[Array, "B K R S"]) -> Float[Array, "B K G S"]:
    return lax.dot_general(query, labels, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def score_keys(q: Float[Array, "B N H"], keys: Rows) -> Float[Array, "B N S"]:
    """Scores q . k / sqrt(H) on all channels, in float32, for every slot of the cache. Labels approximate them."""
    B, K, S, H = keys.shape
    N = q.shape[1]
    scores = lax.dot_general(
        q.reshape(B, K, N // K, H),
        row_floats(keys),
        (((3,), (3,)), ((0, 1), (0, 1))),
        preferred_element_type=jnp.float32,
    )
    return scores.reshape(B, N, S) * H**-0.5
