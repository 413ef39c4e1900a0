"""The decoder: LLaMA, Mistral and Qwen2 are this one module with different configurations; attention is passed in."""

from collections.abc import Callable
from typing import Protocol, TypeVar, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from hshare_jax.models.config import ModelConfig
from hshare_jax.models.layers import GatedMLP, Linear, RMSNorm, project
from hshare_jax.models.rope import rotate, rotation
from hshare_jax.shapes import Hidden, NewKeysValues, Queries, Tokens

State = TypeVar("State")
Tree = TypeVar("Tree")
KeysValues = tuple[NewKeysValues, NewKeysValues]
Rotation = tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]


@runtime_checkable
class Attend(Protocol[State]):
    """A model's attention: it stores the new keys and values, attends, and returns (output, new state).

    Queries and keys arrive rotated, and belong to layer `ModelConfig.kv_layer`; k and v are None where the layer's own
    are not used and nothing is to be stored. What the layer sees is `ModelConfig.sees`. The model knows nothing of
    caches, masks or lists; dense decoding, prefill, sparse decoding and training are all functions of this type.
    """

    def __call__(
        self, layer: int, q: Queries, k: NewKeysValues | None, v: NewKeysValues | None, state: State, /
    ) -> tuple[Queries, State]: ...


class DecoderLayer(nn.Module):
    """One layer: attention, then the gated mlp, each behind a norm and added to the residual stream."""

    config: ModelConfig
    layer: int

    def setup(self) -> None:
        c = self.config
        query_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.attention_norm = RMSNorm(c.norm_eps)
        if c.kv_layer(self.layer) == self.layer:
            self.qkv = Linear(query_width + 2 * kv_width, c.qkv_bias)
        else:
            self.q = Linear(query_width, c.qkv_bias)
        self.out = Linear(c.width, c.out_bias)
        self.mlp_norm = RMSNorm(c.norm_eps)
        self.mlp = GatedMLP(c.mlp_width, c.mlp_bias)

    def __call__(
        self, x: Hidden, turn: Rotation, attend: Attend[State], state: State, looked_up: KeysValues | None = None
    ) -> tuple[Hidden, State, KeysValues | None]:
        """Returns (hidden states, state, the keys and values attended to where they are not in the state yet)."""
        c = self.config
        B, T, _ = x.shape
        N, K, H = c.num_heads, c.num_kv_heads, c.head_dim
        normed = self.attention_norm(x)
        if c.kv_layer(self.layer) == self.layer:
            q, k, v = jnp.split(self.qkv(normed).reshape(B, T, N + 2 * K, H), [N, N + K], axis=2)
            kv = rotate(k, *turn), v
        else:
            q, kv = self.q(normed).reshape(B, T, N, H), looked_up
        out, state = attend(self.layer, rotate(q, *turn), *(kv or (None, None)), state)
        x = x + self.out(out.reshape(B, T, N * H))
        return x + self.mlp(self.mlp_norm(x)), state, kv

    def keys_values(self, x: Hidden, turn: Rotation) -> KeysValues:
        """Returns the layer's keys and values alone."""
        c = self.config
        B, T, _ = x.shape
        fused = self.qkv(self.attention_norm(x), first=c.num_heads * c.head_dim)
        k, v = jnp.split(fused.reshape(B, T, 2 * c.num_kv_heads, c.head_dim), 2, axis=2)
        return rotate(k, *turn), v


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

        Token by token, from the bottom up, is what defines the model. For more tokens at once, layers that look up are
        iterated (`ModelConfig.forward_passes`).

        Args:
            tokens: ids in [0, vocab_size) [B, T].
            positions: the place of each token in its own row, from 0 [B, T].
            attend: the attention, called from the bottom up; more than once for layers that are iterated, where only
                the state of the last time is kept.
            state: whatever `attend` carries.
        """
        x = _embed(self.embedding, tokens)
        turn = rotation(self.config.rope, self.config.head_dim, positions)
        for block in self.config.blocks:
            found = self._iterate(block, x, turn, attend, state)
            for layer in block:
                looked_up = found.get(self.config.kv_layer(layer)) if self.config.looks_up(layer) else None
                x, state, _ = self.layers[layer](x, turn, attend, state, looked_up)
        return self.final_norm(x), state

    def _iterate(
        self, block: range, x: Hidden, turn: Rotation, attend: Attend[State], state: State
    ) -> dict[int, KeysValues]:
        """Returns the keys and values that the last pass over a block looks up, found by the passes before it.

        Every pass starts from the same hidden states and looks up what the pass before it computed, at first zeros
        (arXiv 2410.14442, section 3.2; its parent, arXiv 2405.10637, section 2.2). After p passes p tokens are exact.
        """
        c, (B, T, _) = self.config, x.shape
        targets = sorted({c.kv_layer(layer) for layer in block if c.looks_up(layer)})
        if T == 1 or not targets:  # one token looks up nothing that its own step computes
            return {}
        unbound = [self.layers[layer].unbind() for layer in block]
        layers, variables = [layer for layer, _ in unbound], [its for _, its in unbound]

        def look(found: dict[int, KeysValues], inputs: tuple) -> dict[int, KeysValues]:
            """Returns the keys and values after one more pass; of the last layer nothing else is computed."""
            x, state, variables = inputs
            new = {}
            for layer, decoder_layer, its in zip(block[:-1], layers, variables, strict=False):
                looked_up = found[c.kv_layer(layer)] if c.looks_up(layer) else None
                x, state, new[layer] = decoder_layer.apply(its, x, turn, attend, state, looked_up)  # pyright: ignore[reportAssignmentType]
            new[block[-1]] = layers[-1].apply(variables[-1], x, turn, method="keys_values")
            return {target: new[target] for target in targets}

        backward = min(c.backward_passes, T)
        most = T - backward if c.forward_passes is None else min(c.forward_passes, T - backward)
        fixed = lax.stop_gradient((x, state, variables))
        none = jnp.zeros((B, T, c.num_kv_heads, c.head_dim), x.dtype)
        found = dict.fromkeys(targets, (none, none))
        if c.forward_passes is not None:
            found = lax.fori_loop(0, most, lambda _, found: look(found, fixed), found)
        else:
            found = _until_equal(lambda found: look(found, fixed), found, most)
        for _ in range(backward - 1):
            found = look(found, (x, state, variables))
        return found

    def unembed(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Returns float32 logits of hidden states."""
        weight = self.embedding if self.config.tie_embeddings else self.unembedding
        return project(weight, hidden).astype(jnp.float32)


@jax.custom_vjp
def _embed(embedding: Float[Array, "V D"], tokens: Tokens) -> Hidden:
    """Returns the rows of the tokens; the gradient of a row is summed in float32, however many tokens share it."""
    return embedding[tokens]


def _embed_forward(embedding: Array, tokens: Array) -> tuple[Array, tuple[Array, Array]]:
    return embedding[tokens], (embedding, tokens)


def _embed_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    embedding, tokens = kept
    total = jnp.zeros(embedding.shape, jnp.float32).at[tokens].add(gradient.astype(jnp.float32))
    return total.astype(embedding.dtype), None


_embed.defvjp(_embed_forward, _embed_backward)


def parameter_shapes(config: ModelConfig) -> dict:
    """Returns the parameter tree of `Decoder(config)`, a ShapeDtypeStruct at every leaf; nothing is allocated."""

    def attend(layer: int, q: Array, k: Array | None, v: Array | None, state: None) -> tuple[Array, None]:
        return q, None

    token = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(lambda: Decoder(config).init(jax.random.key(0), token, token, attend, None))["params"]


def _until_equal(step: Callable[[Tree], Tree], start: Tree, most: int) -> Tree:
    """Returns step(step(...start)), at most `most` times, and no more once a step has changed nothing."""

    def is_open(carry: tuple[Array, Array, Tree]) -> Array:
        return carry[1] & (carry[0] < most)

    def body(carry: tuple[Array, Array, Tree]) -> tuple[Array, Array, Tree]:
        count, _, old = carry
        new = step(old)
        has_changed = [(a != b).any() for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)]
        return count + 1, jnp.stack(has_changed).any(), new

    return lax.while_loop(is_open, body, (jnp.int32(0), jnp.bool_(True), start))[2]
