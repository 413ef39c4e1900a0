"""Random weights that depend only on the name and shape of a tensor, so that torch and JAX can hold the same model."""

import zlib

import jax.numpy as jnp
import numpy as np

from hshare_jax.models.config import ModelConfig
from hshare_jax.models.weights import row_order, tensor_layout


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random float32 values for the tensor that Hugging Face calls `name`. No tensor is all zeros or all ones."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("norm.weight"):
        values = 1 + 0.2 * values
    elif name.endswith(".bias"):
        values = 0.2 * values
    elif name != "model.embed_tokens.weight":
        values = values * 1.5 * shape[1] ** -0.5
    return values.astype(np.float32)


def random_params(config: ModelConfig, dtype: jnp.dtype | type = jnp.float32) -> dict:
    """The decoder's parameter tree with random weights."""
    params: dict = {}
    for path, parts in tensor_layout(config).items():
        *branches, leaf = path.split("/")
        node = params
        for branch in branches:
            node = node.setdefault(branch, {})
        stack, order = np.concatenate([random_tensor(*part) for part in parts.items()]), row_order(config, path)
        node[leaf] = jnp.asarray(stack if order is None else stack[order], dtype)
    return params
