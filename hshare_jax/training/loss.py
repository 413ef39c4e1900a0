"""The loss of next-token prediction, computed in chunks, so that the logits of all tokens are never held at once."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from hshare_jax.kernels.block_weights import floats_of
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import run_decoder
from hshare_jax.training.attention import causal_attend

_CHUNK = 1 << 25  # logits that are held at once: 128 MB


def perplexity_of(loss: float) -> float:
    """The perplexity, e to the power of a loss in nats per token. A loss above 700 would overflow and counts as 700."""
    return math.exp(min(loss, 700.0))


def perplexity(params: dict[str, Any], windows: Int[np.ndarray, "N T1"], *, config: ModelConfig) -> float:
    """The model's perplexity over windows of tokens, computed window by window and without a cache.

    The first token of each window is not predicted. Attention is dense here. The perplexity of a sparse method comes
    from decode steps instead (`hshare_jax.evaluation.text_windows.Scorer`).
    """
    total = sum(float(_window_loss(params, jnp.asarray(window)[None], config=config)) for window in windows)
    return perplexity_of(total / windows[:, 1:].size)


@functools.partial(jax.jit, static_argnames=("config",))
def _window_loss(params: dict[str, Any], window: Int[Array, "1 T1"], *, config: ModelConfig) -> Float[Array, ""]:
    return sum_of_window_losses(params, window, config=config)


def sum_of_window_losses(
    params: dict[str, Any],
    windows: Int[Array, "b T1"],
    is_real: Bool[Array, "b"] | None = None,
    *,
    config: ModelConfig,
) -> Float[Array, ""]:
    """The summed loss (nats) of all tokens of the windows except the first token of each window.

    Args:
        params: the model's parameters, in the dtype to compute in.
        windows: token ids. Each token is predicted from the earlier tokens of the window (teacher forcing).
        is_real: the windows that count. None counts all windows.
        config: the model's configuration.
    """
    tokens, targets = windows[:, :-1], windows[:, 1:]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)
    hidden, _ = run_decoder(params, tokens, positions, causal_attend(config), {}, config=config)
    if is_real is not None:
        targets = jnp.where(is_real[:, None], targets, -1)
    unembedding = floats_of(params["embedding" if config.tie_embeddings else "unembedding"])
    return sum_of_losses(unembedding, hidden.reshape(-1, config.width), targets.reshape(-1))


@jax.custom_vjp
def sum_of_losses(
    weight: Float[Array, "V D"], hidden: Float[Array, "M D"], targets: Int[Array, "M"]
) -> Float[Array, ""]:
    """The summed negative log-likelihood (nats, float32) of `targets` under the logits `hidden @ weight.T`.

    The gradients are computed in the same pass, chunk by chunk, so that no logits are computed twice.

    Args:
        weight: the unembedding.
        hidden: hidden states after the last norm. The logits are float32 for every dtype of the hidden states.
        targets: token ids in [0, V), or -1 for a row that does not count.
    """

    def add(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        return total + _chunk(weight, *chunk)[0], None

    return lax.scan(add, jnp.float32(0), _chunks(weight, hidden, targets))[0]


def _forward(weight: Array, hidden: Array, targets: Array) -> tuple[Array, tuple[Array, Array]]:
    def add(carry: tuple[Array, Array], chunk: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        total, to_weight = carry
        loss, to_logits = _chunk(weight, *chunk)
        to_logits = to_logits.astype(hidden.dtype)
        # Summed as [D, V] and transposed once at the end: on XLA:CPU this takes half the time of summing [V, D].
        to_weight += jnp.einsum("MD,MV->DV", chunk[0], to_logits, preferred_element_type=jnp.float32)
        return (total + loss, to_weight), jnp.einsum("MV,VD->MD", to_logits, weight)

    start = jnp.float32(0), jnp.zeros(weight.shape[::-1], jnp.float32)
    (total, to_weight), to_hidden = lax.scan(add, start, _chunks(weight, hidden, targets))
    return total, (to_weight.T.astype(weight.dtype), to_hidden.reshape(-1, hidden.shape[-1])[: len(hidden)])


def _backward(gradients: tuple[Array, Array], scale: Array) -> tuple[Array, Array, None]:
    to_weight, to_hidden = gradients
    return to_weight * scale.astype(to_weight.dtype), to_hidden * scale.astype(to_hidden.dtype), None


sum_of_losses.defvjp(_forward, _backward)


def _chunks(weight: Array, hidden: Array, targets: Array) -> tuple[Float[Array, "C m D"], Int[Array, "C m"]]:
    """Cuts rows into equal chunks. The rows that fill up the last chunk do not count."""
    rows = len(hidden)
    num_chunks = -(-rows * len(weight) // _CHUNK)
    size = -(-rows // num_chunks)
    missing = num_chunks * size - rows
    hidden = jnp.pad(hidden, ((0, missing), (0, 0)))
    targets = jnp.pad(targets, (0, missing), constant_values=-1)
    return hidden.reshape(num_chunks, size, -1), targets.reshape(num_chunks, size)


def _chunk(weight: Array, hidden: Array, targets: Array) -> tuple[Float[Array, ""], Float[Array, "m V"]]:
    """The summed loss of a chunk, and the gradient of this loss with respect to the logits."""
    logits = jnp.einsum("MD,VD->MV", hidden, weight, preferred_element_type=jnp.float32)
    counts = targets >= 0
    is_target = jnp.arange(len(weight))[None, :] == targets[:, None]
    most = logits.max(axis=-1, keepdims=True)
    log_norm = most + jnp.log(jnp.exp(logits - most).sum(axis=-1, keepdims=True))
    picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[:, None], axis=-1)
    loss = jnp.where(counts, (log_norm - picked)[:, 0], 0).sum()
    return loss, jnp.where(counts[:, None], jnp.exp(logits - log_norm) - is_target, 0)
