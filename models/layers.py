"""The parts of the decoder: normalisation, projections with weights stored [out, in], and the gated mlp."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from hshare_jax.kernels.api import project
from hshare_jax.kernels.block_weights import BlockWeights, Weights

# Computes x @ weight.T (`kernels.api.project`). By default as the definition does, which can be differentiated.
Project = Callable[[Weights, Array], Array]
PROJECT: Project = functools.partial(project, impl="reference")


class RMSNorm(nn.Module):
    """x divided by its root mean square over the last axis, then scaled. Computed in float32 (arXiv 1910.07467)."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        # Scaled in float32, so that the gradient of the scale, a sum over all tokens, is summed in float32 too. The
        # product of two bfloat16 numbers is exact in float32.
        normed = wide.astype(x.dtype).astype(jnp.float32)
        scale = jnp.expand_dims(scale, range(x.ndim - 1)).astype(jnp.float32)
        return (normed * scale).astype(x.dtype)


def weights_of(module: nn.Module, name: str, init: Callable, shape: tuple[int, int]) -> Weights:
    """A parameter of floats, or in few bits. Only floats are initialised and checked by Flax."""
    found = module.get_variable("params", name)
    return found if isinstance(found, BlockWeights) else module.param(name, init, shape)


class Linear(nn.Module):
    """A linear projection. Its weight is stored [features, in], as in Hugging Face checkpoints."""

    features: int
    use_bias: bool = False
    project: Project = PROJECT

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"], first: int = 0) -> Float[Array, "*rows out"]:
        """The projection of x, without the features before `first`."""
        weight = weights_of(self, "weight", _fan_in_normal, (self.features, x.shape[-1]))
        out = self.project(weight[first:] if first else weight, x)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            out = out + jnp.expand_dims(bias[first:], range(x.ndim - 1))
        return out


def _fan_in_normal(key: Array, shape: tuple[int, int]) -> Array:
    return jax.random.normal(key, shape) * shape[1] ** -0.5


class GatedMLP(nn.Module):
    """The gated mlp: down(silu(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202). One projection computes gate and up."""

    mlp_width: int
    use_bias: bool = False
    project: Project = PROJECT

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate, up = jnp.split(Linear(2 * self.mlp_width, self.use_bias, self.project, name="gate_up")(x), 2, axis=-1)
        return Linear(x.shape[-1], self.use_bias, self.project, name="down")(nn.silu(gate) * up)
