"""The parts of the decoder: normalisation, projections with weights stored [out, in], and the gated mlp."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from hshare_jax.kernels.api import project
from hshare_jax.kernels.block_weights import BlockWeights, Weights
from hshare_jax.models.config import ModelConfig
from hshare_jax.shapes import MODEL

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


def qkv_rows(config: ModelConfig) -> tuple[Int[np.ndarray, "NH"], Int[np.ndarray, "KH"], Int[np.ndarray, "KH"]]:
    """The rows of the projection `qkv` that compute queries, keys and values, each head for head.

    The rows of a group of heads lie together: its queries, its key, its value. So any division of the kv heads cuts the
    projection into whole groups.

        # 4 query heads, 2 kv heads of size 1:  q0 q1 k0 v0 | q2 q3 k1 v1  -> [0 1 4 5], [2 6], [3 7]
    """
    G, K, H = config.num_heads // config.num_kv_heads, config.num_kv_heads, config.head_dim
    rows = np.arange(K * (G + 2) * H).reshape(K, G + 2, H)
    return rows[:, :G].reshape(-1), rows[:, G].reshape(-1), rows[:, G + 1].reshape(-1)


class Linear(nn.Module):
    """A linear projection. Its weight is stored [features, in], as in Hugging Face checkpoints.

    With `sums_parts` the inputs are divided among the devices of the mesh axis "model", and the products are summed
    over them.
    """

    features: int
    use_bias: bool = False
    project: Project = PROJECT
    sums_parts: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "*rows D"], only: Int[np.ndarray, "some"] | None = None
    ) -> Float[Array, "*rows out"]:
        """The projection of x; only these features, if they are named."""
        weight = weights_of(self, "weight", _fan_in_normal, (self.features, x.shape[-1]))
        out = self.project(weight if only is None else weight[only], x)
        if self.sums_parts:
            out = lax.psum(out, MODEL)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            out = out + jnp.expand_dims(bias if only is None else bias[only], range(x.ndim - 1))
        return out


def _fan_in_normal(key: Array, shape: tuple[int, int]) -> Array:
    return jax.random.normal(key, shape) * shape[1] ** -0.5


class GatedMLP(nn.Module):
    """The gated mlp: down(silu(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202).

    One projection computes gate and up. Its rows alternate between them, so that any division keeps pairs whole.
    """

    mlp_width: int
    use_bias: bool = False
    project: Project = PROJECT
    sums_parts: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        both = Linear(2 * self.mlp_width, self.use_bias, self.project, name="gate_up")(x)
        both = both.reshape(*x.shape[:-1], self.mlp_width, 2)
        down = Linear(x.shape[-1], self.use_bias, self.project, self.sums_parts, name="down")
        return down(nn.silu(both[..., 0]) * both[..., 1])
