"""The model that training starts from: random weights, or a model whose layers are made to share keys and values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import Decoder
from hshare_jax.models.kv_sharing import Init, share_weights
from hshare_jax.models.pretrained import Model
from hshare_jax.models.weights import load_parameters
from hshare_jax.training.attention import causal_attend


def new_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None, *, name: str = "model", seed: int = 0
) -> Model:
    """A model of random float32 weights. The same seed gives the same weights."""

    def init(key: jax.Array) -> dict:
        token = jnp.zeros((1, 1), jnp.int32)
        return dict(Decoder(config).init(key, token, token, causal_attend(config), {})["params"])

    end = None if tokenizer is None else tokenizer.eos_token_id
    ends = (end,) if isinstance(end, int) else ()
    return _with_params(Model(config, jax.jit(init)(jax.random.key(seed)), tokenizer, ends, name, ""))


def share_layers(model: Model, config: ModelConfig, *, init: Init = "mean", name: str | None = None) -> Model:
    """The model with layers that share keys and values. It predicts badly until it has been trained further.

    Args:
        model: the model to convert.
        config: the result's configuration, made by `share_kv` from the model's.
        init: where the shared projections come from, as in `share_weights`.
        name: the result's name. None keeps the model's.
    """
    params = share_weights(model.params, model.config, config, init)
    return _with_params(dataclasses.replace(model, config=config, params=params, name=name or model.name))


def _with_params(model: Model) -> Model:
    """The model, its identity computed from its parameters."""
    flat = jax.tree.flatten_with_path(model.params)[0]
    named = ((jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(leaf)) for path, leaf in flat)
    params, identity = load_parameters(model.config, named)
    return dataclasses.replace(model, params=params, identity=identity)
