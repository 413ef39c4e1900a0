"""The decoder: one Flax module computes LLaMA and its relatives, which differ in their `ModelConfig` alone.

The module is written in Flax Linen, because parameters and caches are explicit pytrees here and attention is passed in
as a function, whereas NNX modules own their state. For NNX programs there is `flax.nnx.bridge.ToNNX(Decoder(config))`.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from hshare_jax.kernels.block_weights import BlockWeights
from hshare_jax.mesh import AnyMesh, Layout, layout_of, num_parts
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.layers import PROJECT, GatedMLP, Linear, Project, RMSNorm, qkv_rows, weights_of
from hshare_jax.models.rope import rotate, rotation
from hshare_jax.shapes import MODEL, Hidden, NewKeysValues, Queries, Tokens

State = TypeVar("State")
Tree = TypeVar("Tree")
KeysValues = tuple[NewKeysValues, NewKeysValues]
Rotation = tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]


@runtime_checkable
class Attend(Protocol[State]):
    """Attention of one layer: stores the new keys and values, attends, and returns (output, new state).

    Queries and keys arrive normed and rotated, as far as the layer does either. k and v belong to layer
    `ModelConfig.kv_layer`. They are None if the state holds them already, because that layer has stored them; then
    nothing is to be stored. `ModelConfig.sees` says which positions the layer sees. Dense decoding, prefill, sparse
    decoding and training are all functions of this type, so the model knows nothing of caches, masks or lists.
    """

    def __call__(
        self, layer: int, q: Queries, k: NewKeysValues | None, v: NewKeysValues | None, state: State, /
    ) -> tuple[Queries, State]: ...


class DecoderLayer(nn.Module):
    """One layer: attention, then the gated mlp. Each has a norm before it and adds to the residual stream."""

    config: ModelConfig
    layer: int
    project: Project = PROJECT

    def setup(self) -> None:
        c = self.config
        query_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        self.attention_norm = RMSNorm(c.norm_eps)
        if c.kv_layer(self.layer) == self.layer:
            self.qkv = Linear(query_width + 2 * kv_width, c.qkv_bias, self.project)
        else:
            self.q = Linear(query_width, c.qkv_bias, self.project)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.norm_eps)
            if c.kv_layer(self.layer) == self.layer:
                self.k_norm = RMSNorm(c.norm_eps)
        self.out = Linear(c.width, c.out_bias, self.project, c.is_part)
        self.mlp_norm = RMSNorm(c.norm_eps)
        self.mlp = GatedMLP(c.mlp_width, c.mlp_bias, self.project, c.is_part)

    def __call__(
        self, x: Hidden, turn: Rotation, attend: Attend[State], state: State, looked_up: KeysValues | None = None
    ) -> tuple[Hidden, State, KeysValues | None]:
        """Evaluates the layer: (hidden states, state, keys and values).

        Args:
            x: hidden states.
            turn: cos and sin of the positions, from `rotation`.
            attend: the attention.
            state: the state of `attend`.
            looked_up: the keys and values of a layer above, for a layer that looks up while several tokens are given.

        Returns:
            The keys and values are those handed to `attend`; None where `attend` got none.
        """
        c = self.config
        B, T, _ = x.shape
        N, K, H = c.num_heads, c.num_kv_heads, c.head_dim
        normed = self.attention_norm(x)
        if c.kv_layer(self.layer) == self.layer:
            groups = self.qkv(normed).reshape(B, T, K, N // K + 2, H)  # see `layers.qkv_rows`
            q, k, v = groups[:, :, :, :-2].reshape(B, T, N, H), groups[:, :, :, -2], groups[:, :, :, -1]
            kv = self._finish_keys(k, turn), v
        else:
            q, kv = self.q(normed).reshape(B, T, N, H), looked_up
        out, state = attend(self.layer, self._finish_queries(q, turn), *(kv or (None, None)), state)
        x = x + self.out(out.reshape(B, T, N * H))
        return x + self.mlp(self.mlp_norm(x)), state, kv

    def keys_values(self, x: Hidden, turn: Rotation) -> KeysValues:
        """The layer's new keys and values, without anything else that the layer computes."""
        c = self.config
        B, T, _ = x.shape
        _, *rows = qkv_rows(c)
        fused = self.qkv(self.attention_norm(x), only=np.concatenate(rows))
        k, v = jnp.split(fused.reshape(B, T, 2 * c.num_kv_heads, c.head_dim), 2, axis=2)
        return self._finish_keys(k, turn), v

    def _finish_queries(self, q: Queries, turn: Rotation) -> Queries:
        q = self.q_norm(q) if self.config.qk_norm else q
        return rotate(q, *turn) if self.config.is_rotated(self.layer) else q

    def _finish_keys(self, k: NewKeysValues, turn: Rotation) -> NewKeysValues:
        k = self.k_norm(k) if self.config.qk_norm else k
        return rotate(k, *turn) if self.config.is_rotated(self.layer) else k


class Decoder(nn.Module):
    """The whole decoder. `run_decoder` and `unembed` below apply it as pure functions."""

    config: ModelConfig
    project: Project = PROJECT

    def setup(self) -> None:
        c = self.config
        shape = c.vocab_size // (c.num_parts if c.divides_vocabulary else 1), c.width
        self.embedding = weights_of(self, "embedding", nn.initializers.normal(0.02), shape)
        self.layers = [DecoderLayer(c, layer, self.project) for layer in range(c.num_layers)]
        self.final_norm = RMSNorm(c.norm_eps)
        if not c.tie_embeddings:
            self.unembedding = weights_of(self, "unembedding", nn.initializers.normal(0.02), shape)

    def __call__(
        self, tokens: Tokens, positions: Int[Array, "B T"], attend: Attend[State], state: State
    ) -> tuple[Hidden, State]:
        """Evaluates all layers: (hidden states after the last norm [B, T, D], state).

        The model is defined token by token, from the bottom layer up. Several tokens at once take several passes over
        layers that look up (`ModelConfig.forward_passes`).

        Args:
            tokens: ids in [0, vocab_size) [B, T].
            positions: the place of each token in its row, from 0 [B, T].
            attend: the attention, called for each layer from the bottom up. It is called for every pass, but only the
                state that the last pass returns is kept.
            state: the state of `attend`.
        """
        x = self._embed(tokens)
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
        """The keys and values that layers of a block look up in the last pass, computed by the passes before it.

        Every pass starts from the same hidden states and looks up what the pass before it computed, the first pass
        zeros (arXiv 2410.14442, section 3.2; its parent, arXiv 2405.10637, section 2.2). After p passes the first p
        tokens are exact.

        The layers are unbound and applied to their variables by hand, because Linen's own loops do not serve. `nn.scan`
        and `nn.while_loop` take the variables from the module, so the gradient cannot be stopped at the variables but
        only at the results of a pass, and `nn.scan` traces its body twice. The compiled program would be as fast, but
        tracing takes half as long again (16 layers with gradient: 2.4 s instead of 1.5 s).
        """
        c, (B, T, _) = self.config, x.shape
        targets = sorted({c.kv_layer(layer) for layer in block if c.looks_up(layer)})
        if T == 1 or not targets:  # a single token looks up only earlier tokens, which the state holds
            return {}
        unbound = [self.layers[layer].unbind() for layer in block]
        layers, variables = [layer for layer, _ in unbound], [own for _, own in unbound]

        def look(found: dict[int, KeysValues], inputs: tuple) -> dict[int, KeysValues]:
            """One more pass: the new keys and values. The last layer computes nothing else."""
            x, state, variables = inputs
            new = {}
            for layer, decoder_layer, own in zip(block[:-1], layers, variables, strict=False):
                looked_up = found[c.kv_layer(layer)] if c.looks_up(layer) else None
                x, state, new[layer] = decoder_layer.apply(own, x, turn, attend, state, looked_up)  # pyright: ignore[reportAssignmentType]
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
            found = _until_equal(lambda found: look(found, fixed), found, most, MODEL if c.is_part else None)
        for _ in range(backward - 1):
            found = look(found, (x, state, variables))
        return found

    def _embed(self, tokens: Tokens) -> Hidden:
        of, is_divided = self.embedding, self.config.divides_vocabulary
        index = tokens - lax.axis_index(MODEL) * of.shape[0] if is_divided else tokens
        is_here = (index >= 0) & (index < of.shape[0])
        if is_divided:
            index = jnp.where(is_here, index, 0)
        x = of[index].to_floats() if isinstance(of, BlockWeights) else _look_up(of, index)
        return lax.psum(jnp.where(is_here[:, :, None], x, 0), MODEL) if is_divided else x

    def unembed(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """Float32 logits of hidden states."""
        weight = self.embedding if self.config.tie_embeddings else self.unembedding
        logits = self.project(weight, hidden).astype(jnp.float32)
        if self.config.divides_vocabulary:
            logits = lax.all_gather(logits, MODEL, axis=logits.ndim - 1, tiled=True)
        return logits


@jax.custom_vjp
def _look_up(embedding: Float[Array, "V D"], tokens: Tokens) -> Hidden:
    """The embedding of each token. The gradient of a row is summed in float32, because many tokens may share it."""
    return embedding[tokens]


def _look_up_forward(embedding: Array, tokens: Array) -> tuple[Array, tuple[Array, Array]]:
    return embedding[tokens], (embedding, tokens)


def _look_up_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    embedding, tokens = kept
    total = jnp.zeros(embedding.shape, jnp.float32).at[tokens].add(gradient.astype(jnp.float32))
    return total.astype(embedding.dtype), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


def run_decoder(
    params: dict[str, Any],
    tokens: Tokens,
    positions: Int[Array, "B T"],
    attend: Attend[State],
    state: State,
    *,
    config: ModelConfig,
    project: Project = PROJECT,
) -> tuple[Hidden, State]:
    """Applies the decoder to tokens: (hidden states after the last norm [B, T, D], state).

    Args:
        params: the parameter tree.
        tokens, positions, attend, state: as for `Decoder.__call__`.
        config: the model's configuration.
        project: how projections are computed.
    """
    return Decoder(config, project).apply({"params": params}, tokens, positions, attend, state)  # pyright: ignore[reportReturnType]


def unembed(
    params: dict[str, Any], hidden: Float[Array, "*rows D"], *, config: ModelConfig, project: Project = PROJECT
) -> Float[Array, "*rows V"]:
    """Float32 logits of hidden states that `run_decoder` returned."""
    return Decoder(config, project).apply({"params": params}, hidden, method="unembed")  # pyright: ignore[reportReturnType]


def parameter_layouts(params: dict[str, Any], mesh: AnyMesh | None) -> Any:
    """How each array of a parameter tree lies on a mesh, as a tree of `mesh.Layout`.

    Projections of the attention and the mlp are divided by the heads and the mlp's channels, on the side that has them.
    The vocabulary is divided if that is possible. Everything else is whole on every device.
    """
    parts = num_parts(mesh)

    def layout(path: tuple, array: Any) -> Layout:
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return layout_of_parameter("/".join(names), array.shape, parts)

    return jax.tree_util.tree_map_with_path(layout, params)


def layout_of_parameter(path: str, shape: tuple[int, ...], parts: int) -> Layout:
    """How an array of a parameter lies on a mesh that divides heads into `parts`.

    Arrays of weights in few bits lie as the floats would. A scale for a whole row is the same on all devices.

    Args:
        path: of the parameter, such as `layers_0/qkv/weight`.
        shape: of the array.
        parts: over how many devices heads are divided.
    """
    *_, name, kind = ["", *path.split("/")]
    if kind in ("embedding", "unembedding"):
        return layout_of("D" if shape[0] % parts else "N")
    if name in ("qkv", "q", "gate_up"):
        return layout_of("N")
    if name in ("out", "down") and kind == "weight" and shape[1] > 1:
        return layout_of("D N")
    return layout_of("D")


def parameter_shapes(config: ModelConfig) -> dict:
    """The parameter tree of `Decoder(config)` with a ShapeDtypeStruct at every leaf. Nothing is allocated."""

    def attend(layer: int, q: Array, k: Array | None, v: Array | None, state: None) -> tuple[Array, None]:
        return q, None

    token = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(lambda: Decoder(config).init(jax.random.key(0), token, token, attend, None))["params"]


def _until_equal(step: Callable[[Tree], Tree], start: Tree, most: int, axis: str | None) -> Tree:
    """Applies `step` to `start` again and again, until a step changes nothing or `most` steps are done.

    All devices of a mesh axis go on as long as one of them must.
    """

    def is_open(carry: tuple[Array, Array, Tree]) -> Array:
        return carry[1] & (carry[0] < most)

    def body(carry: tuple[Array, Array, Tree]) -> tuple[Array, Array, Tree]:
        count, _, old = carry
        new = step(old)
        has_changed = [(a != b).any() for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)]
        is_open = jnp.stack(has_changed).any()
        return count + 1, is_open if axis is None else lax.pmax(is_open.astype(jnp.int32), axis) > 0, new

    return lax.while_loop(is_open, body, (jnp.int32(0), jnp.bool_(True), start))[2]
