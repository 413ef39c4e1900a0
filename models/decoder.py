"""The decoder: LLaMA, Mistral and Qwen2 are this one module with different configurations; attention is passed in."""

from typing import Protocol, TypeVar, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from hshare_jax.models.config import ModelConfig
from hshare_jax.models.layers import GatedMLP, Linear, RMSNorm, project
from hshare_jax.models.rope import rotate, rotation
from hshare_jax.shapes import Hidden, NewKeysValues, Queries, Tokens

State = TypeVar("State")


@runtime_checkable
class Attend(Protocol[State]):
    """A model's attention: it stores the new keys and values, attends, and returns (output, new state).

    Queries and keys arrive rotated. The model knows nothing of caches, masks or sharing; dense decoding, prefill,
    sparse decoding and training are all functions of this type.
    """

    def __call__(
        self, layer: int, q: Queries, k: NewKeysValues, v: NewKeysValues, state: State, /
    ) -> tuple[Queries, State]: ...


class DecoderLayer(nn.Module):
    """One layer: attention, then the gated mlp, each behind a norm and added to the residual stream."""

    config: ModelConfig
    layer: int

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        cos: Float[Array, "B T 1 half"],
        sin: Float[Array, "B T 1 half"],
        attend: Attend[State],
        state: State,
    ) -> tuple[Hidden, State]:
        c = self.config
        B, T, D = x.shape
        N, K, H = c.num_heads, c.num_kv_heads, c.head_dim
        fused = Linear((N + 2 * K) * H, c.qkv_bias, name="qkv")(RMSNorm(c.norm_eps, name="attention_norm")(x))
        q, k, v = jnp.split(fused.reshape(B, T, N + 2 * K, H), [N, N + K], axis=2)
        out, state = attend(self.layer, rotate(q, cos, sin), rotate(k, cos, sin), v, state)
        x = x + Linear(D, c.out_bias, name="out")(out.reshape(B, T, N * H))
        return x + GatedMLP(c.mlp_width, c.mlp_bias, name="mlp")(RMSNorm(c.norm_eps, name="mlp_norm")(x)), state


class Decoder(nn.Module):
    """The whole decoder as pure functions: `hidden, state = apply(...)`, then `unembed` where logits are wanted."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), (c.vocab_size, c.width))
        self.layers = [DecoderLayer(c, layer) for layer in range(c.num_layers)]
        self.final_norm = RMSNorm(c.norm_eps)
        if not c.tie_embeddings:
            self.unembedding = self.param("unembedding", nn.initializers.normal(0.02), (c.vocab_size, c.width))

    def __call__(
        self, tokens: Tokens, positions: Int[Array, "B T"], attend: Attend[State], state: State
    ) -> tuple[Hidden, State]:
        """Returns (hidden states after the last norm [B, T, D], state).

        Args:
            tokens: ids in [0, vocab_size) [B, T].
            positions: the place of each token in its own row, from 0 [B, T].
            attend: the attention, called once a layer from the bottom up.
            state: whatever `attend` carries.
        """
        x = self.embedding[tokens]
        cos, sin = rotation(self.config.rope, self.config.head_dim, positions)
        for layer in self.layers:
            x, state = layer(x, cos, sin, attend, state)
        return self.final_norm(x), state

    def unembed(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Returns float32 logits of hidden states."""
        weight = self.embedding if self.config.tie_embeddings else self.unembedding
        return project(weight, hidden).astype(jnp.float32)


def parameter_shapes(config: ModelConfig) -> dict:
    """Returns the parameter tree of `Decoder(config)`, a ShapeDtypeStruct at every leaf; nothing is allocated."""

    def attend(layer: int, q: Array, k: Array, v: Array, state: None) -> tuple[Array, None]:
        return q, None

    token = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(lambda: Decoder(config).init(jax.random.key(0), token, token, attend, None))["params"]
