"""The tail: virtual tokens of each query head, which stand for all tokens that the head does not read."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from hshare_jax.kernels.masked_softmax import MASKED

MAX_FEATURE = 2.5  # bound on how far a query may move the tail's value along one direction, in standard deviations
NUM_TERMS = 6  # CONSTANT to FOLLOW
CONSTANT, OF_TOTAL, OF_MEAN, LOW, HIGH, FOLLOW = range(NUM_TERMS)  # places of `Tail.terms`; shifts come after them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tail:
    """One layer's tails. Each query head has 1 + r virtual tokens, where r is the tail's rank.

    After a head has read some slots, it has their output o, the log of the sum of their exponentiated scores (`total`)
    and the mean of their scores (`mean`). Of n slots that it sees and did not read, the tail estimates the weight W, on
    the same scale as the exponentiated scores, and the mean value v:

        log W = log n + clip(constant + q . keys[0] / sqrt(H) + of_total * total + of_mean * mean, low, high)
        v     = values[0] + follow * o + sum of clip(q . keys[i] / sqrt(H) - shift[i], -2.5, 2.5) * values[i], i = 1..r
        out   = o + (v - o) * W / (exp(total) + W)

    A head that has read all that it sees has no tail, and neither has one whose `low` and `high` are MASKED.
    """

    keys: Array  # [B, N, 1 + r, H], in the dtype that the model computes in
    values: Array  # [B, N, 1 + r, H], in the same
    terms: Array  # [B, N, 6 + r] float32: constant, of_total, of_mean, low, high, follow, and the shifts

    def num_tokens(self, row_bytes: int) -> float:
        """How many cached tokens of one kv head have as many bytes as one query head's tail.

        Args:
            row_bytes: bytes of one key or value in the cache.
        """
        size = 2 * self.keys.shape[-2] * self.keys.shape[-1] * self.keys.dtype.itemsize
        return (size + self.terms.shape[-1] * self.terms.dtype.itemsize) / (2 * row_bytes)


class Part(NamedTuple):
    """The attention of each query head over some slots, in float32, and what a tail is fitted on beside it.

    A part without a slot holds zeros, and MASKED in the place of `total`.
    """

    out: Float[Array, "*rows N H"]
    total: Float[Array, "*rows N"]  # the log of the sum of the exponentiated scores
    mean: Float[Array, "*rows N"]  # the mean of the scores
    count: Int[Array, "*rows N"]  # how many slots these are


def no_tail(num_rows: int, num_heads: int, head_dim: int, rank: int, dtype: jnp.dtype) -> Tail:
    """Tails that weigh nothing."""
    tokens = jnp.zeros((num_rows, num_heads, 1 + rank, head_dim), dtype)
    terms = jnp.zeros((num_rows, num_heads, NUM_TERMS + rank), jnp.float32)
    return Tail(tokens, jnp.copy(tokens), terms.at[..., LOW : HIGH + 1].set(MASKED))


def add_tail(
    out: Float[Array, "B N H"],
    total: Float[Array, "B N"],
    mean: Float[Array, "B N"],
    num_unread: Int[Array, "B N"],
    q: Float[Array, "B N H"],
    tail: Tail,
) -> Float[Array, "B N H"]:
    """The attention with its tail, in float32; the formula is `Tail`'s.

    Args:
        out: the attention over the slots that were read, in float32.
        total: the log of the sum of the exponentiated scores that were read.
        mean: the mean of the scores that were read.
        num_unread: how many slots each head sees and did not read.
        q: the rotated queries.
        tail: the layer's tails.
    """
    terms, H = tail.terms, q.shape[-1]
    scores = jnp.einsum("BNH,BNIH->BNI", q, tail.keys, preferred_element_type=jnp.float32) * H**-0.5
    weight = terms[..., CONSTANT] + scores[..., 0] + terms[..., OF_TOTAL] * total + terms[..., OF_MEAN] * mean
    weight = jnp.clip(weight, terms[..., LOW], terms[..., HIGH]) + jnp.log(jnp.maximum(num_unread, 1))
    has_tail = (num_unread > 0) & (terms[..., HIGH] > MASKED)
    share = jnp.where(has_tail, jax.nn.sigmoid(weight - total), 0)
    features = jnp.clip(scores[..., 1:] - terms[..., NUM_TERMS:], -MAX_FEATURE, MAX_FEATURE)
    values = tail.values.astype(jnp.float32)
    value = values[..., 0, :] + terms[..., FOLLOW, None] * out
    value += jnp.einsum("BNI,BNIH->BNH", features, values[..., 1:, :])
    return out + share[..., None] * (value - out)
