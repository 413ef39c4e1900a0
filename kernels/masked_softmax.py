"""Softmax over some of the slots of a cache."""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

# The score of a masked slot. It is finite, so that a row whose slots are all masked gives numbers and not NaN.
MASKED = -1e30
LOG2_E = math.log2(math.e)  # the kernels of GPUs use exp2, which the hardware has


def softmax_over(mask: Bool[Array, "B S"], scores: Float[Array, "B N S"]) -> Float[Array, "B N S"]:
    """Softmax over the slots of the mask; the other slots hold zero. Where the mask is empty, all slots hold 1 / S."""
    return jax.nn.softmax(jnp.where(mask[:, None, :], scores, MASKED), axis=-1)
