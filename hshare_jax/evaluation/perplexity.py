"""Perplexity of a text by whole windows at once: of a model, where no sparse method and no cache is measured."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from hshare_jax.attend import causal_attend
from hshare_jax.evaluation.text_windows import Window
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import Decoder
from hshare_jax.prefill import unembed


def perplexity(config: ModelConfig, params: dict, windows: Sequence[Window]) -> float:
    """Returns exp of the mean negative log-likelihood of all tokens of the windows but each one's first.

    One window is computed at a time, all its tokens at once (teacher forcing).

    Args:
        config: the model.
        params: its parameters.
        windows: from `cut_windows`, all of one length.
    """
    losses = [_losses(params, jnp.asarray([window.tokens], jnp.int32), config=config) for window in windows]
    return math.exp(np.concatenate([np.asarray(loss, np.float64) for loss in losses]).mean())


@functools.partial(jax.jit, static_argnames=("config",))
def _losses(params: dict, tokens: Int[Array, "B T"], *, config: ModelConfig) -> Float[Array, "B steps"]:
    read, following = tokens[:, :-1], tokens[:, 1:]
    positions = jnp.broadcast_to(jnp.arange(read.shape[1]), read.shape)
    hidden, _ = Decoder(config).apply({"params": params}, read, positions, causal_attend(config), {})
    log_p = jax.nn.log_softmax(unembed(params, hidden, config=config), axis=-1)
    return -jnp.take_along_axis(log_p, following[:, :, None], axis=2)[:, :, 0]
