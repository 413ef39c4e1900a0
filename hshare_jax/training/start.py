"""The model that training starts from: random weights in a ready size, or a model whose layers come to share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from hshare_jax.attend import causal_attend
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import Decoder
from hshare_jax.models.kv_sharing import Init, share_weights
from hshare_jax.models.pretrained import Model
from hshare_jax.models.weights import load_parameters

PRESETS = {
    # The smallest of arXiv 2410.14442, which calls it so, in the sizes that its authors publish as llama_small.json.
    "110m": ModelConfig(
        vocab_size=32_000, width=768, mlp_width=2048, num_layers=12, num_heads=12, num_kv_heads=6, head_dim=64,
        max_positions=1024, windows=(None,) * 12,
    ),
    # For experiments on two CPU cores: a run in minutes, and one of some twenty in an hour or two.
    "micro": ModelConfig(
        vocab_size=4096, width=128, mlp_width=352, num_layers=8, num_heads=4, num_kv_heads=2, head_dim=32,
        max_positions=512, windows=(None,) * 8, tie_embeddings=True,
    ),
    "tiny": ModelConfig(
        vocab_size=32_000, width=256, mlp_width=704, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=32,
        max_positions=1024, windows=(None,) * 8, tie_embeddings=True,
    ),
}  # fmt: skip


def preset(name: str, *, vocab_size: int, max_positions: int = 1024) -> ModelConfig:
    """Returns the configuration of a ready size, one of `PRESETS`, for a tokeniser.

    Raises:
        ValueError: another name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} must be one of {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], vocab_size=vocab_size, max_positions=max_positions)


def new_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None, *, name: str = "model", seed: int = 0
) -> Model:
    """Returns a model of random float32 weights, the same for the same seed."""

    def init(key: jax.Array) -> dict:
        token = jnp.zeros((1, 1), jnp.int32)
        return dict(Decoder(config).init(key, token, token, causal_attend(config), {})["params"])

    end = None if tokenizer is None else tokenizer.eos_token_id
    ends = (end,) if isinstance(end, int) else ()
    return _with_params(Model(config, jax.jit(init)(jax.random.key(seed)), tokenizer, ends, name, ""))


def share_layers(model: Model, config: ModelConfig, *, init: Init = "mean", name: str | None = None) -> Model:
    """Returns the model with its layers sharing keys and values; it computes something else, and training mends that.

    Args:
        model: what to convert.
        config: of the result, from `share_kv` of the model's.
        init: of `share_weights`: where the shared projections come from.
        name: of the result; None leaves the model's.
    """
    params = share_weights(model.params, model.config, config, init)
    return _with_params(dataclasses.replace(model, config=config, params=params, name=name or model.name))


def _with_params(model: Model) -> Model:
    """Returns the model under the identity of its parameters."""
    flat = jax.tree.flatten_with_path(model.params)[0]
    named = ((jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(leaf)) for path, leaf in flat)
    params, identity = load_parameters(model.config, named)
    return dataclasses.replace(model, params=params, identity=identity)
