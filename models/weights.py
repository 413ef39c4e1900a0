"""Loading of weights: the tensors of a checkpoint, under their Hugging Face names, become the parameter tree.

A checkpoint format is a `TensorSource`, which hands out a tensor in blocks of rows. Beside the finished parameters only
one block is in memory, and the largest parameters are read first, while memory holds little else. Query, key and value
projections are stacked in one array, and so are gate and up. This saves three products in each layer, and XLA would
otherwise concatenate the weights on every call.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from hashlib import sha256
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from hshare_jax.errors import CheckpointError, SettingError
from hshare_jax.models.config import ModelConfig

DType = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float16")
BLOCK_BYTES = 16 << 20

# Buffers of rotary angles that old versions of transformers saved. The decoder computes these itself.
_HARMLESS = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_ALIGNMENT = 64  # bytes; XLA:CPU copies memory that is aligned less
_SAMPLES = 256


@runtime_checkable
class TensorSource(Protocol):
    """The tensors of one checkpoint, named as Hugging Face names them (`model.layers.0.self_attn.q_proj.weight`)."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor. No tensor is read."""
        ...

    def file_of(self, name: str) -> str:
        """The file to name in an error about tensor `name`. For a missing tensor: the file where it would be."""
        ...

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """Reads tensor `name` in order, in blocks of about `BLOCK_BYTES` along axis 0."""
        ...


def dtype_of(name: str) -> np.dtype:
    """The dtype called `name`. Raises ValueError for a dtype that the decoder cannot run in."""
    if name not in DTYPES:
        raise SettingError("dtype", name, f"must be one of {', '.join(DTYPES)}")
    return jnp.dtype(name)


def tensor_layout(config: ModelConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """How tensors make up parameters: for each parameter the tensors stacked in it along axis 0, with their shapes.

    A parameter is named by its path in the tree, such as `layers_0/qkv/weight`, a tensor as Hugging Face names it.
    """
    D, F, V = config.width, config.mlp_width, config.vocab_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layout = {"embedding": {"model.embed_tokens.weight": (V, D)}, "final_norm/scale": {"model.norm.weight": (D,)}}
    if not config.tie_embeddings:
        layout["unembedding"] = {"lm_head.weight": (V, D)}
    own = {
        "qkv": ({"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys}, D, config.qkv_bias)
    }
    shared = {"q": ({"self_attn.q_proj": queries}, D, config.qkv_bias)}
    rest = {
        "out": ({"self_attn.o_proj": D}, queries, config.out_bias),
        "mlp/gate_up": ({"mlp.gate_proj": F, "mlp.up_proj": F}, D, config.mlp_bias),
        "mlp/down": ({"mlp.down_proj": D}, F, config.mlp_bias),
    }
    for layer in range(config.num_layers):
        ours, theirs = f"layers_{layer}", f"model.layers.{layer}"
        layout[f"{ours}/attention_norm/scale"] = {f"{theirs}.input_layernorm.weight": (D,)}
        layout[f"{ours}/mlp_norm/scale"] = {f"{theirs}.post_attention_layernorm.weight": (D,)}
        projections = (own if layer in config.kv_layers else shared) | rest
        for name, (parts, inputs, has_bias) in projections.items():
            layout[f"{ours}/{name}/weight"] = {f"{theirs}.{part}.weight": (out, inputs) for part, out in parts.items()}
            if has_bias:
                layout[f"{ours}/{name}/bias"] = {f"{theirs}.{part}.bias": (out,) for part, out in parts.items()}
    return layout


def stream_parameters(config: ModelConfig, source: TensorSource, dtype: DType) -> Iterator[tuple[str, np.ndarray]]:
    """Reads all parameters, the largest first: yields (path, array in `dtype` on the host).

    Raises:
        CheckpointError: a tensor is missing, unexpected, of a wrong shape, not finite, or too large for `dtype`. Names
            and shapes are checked before any tensor is read.
    """
    target = dtype_of(dtype)
    layout = tensor_layout(config)
    _check_names_and_shapes(config, source, layout)
    sizes = {path: sum(math.prod(shape) for shape in parts.values()) for path, parts in layout.items()}
    for path in sorted(layout, key=lambda path: -sizes[path]):
        parts = layout[path]
        rows, row_shape = sum(shape[0] for shape in parts.values()), next(iter(parts.values()))[1:]
        array = aligned_empty((rows, *row_shape), target)
        row = 0
        for name in parts:
            for block in source.blocks(name):
                cast_into(array[row : row + len(block)], block, name, source.file_of(name))
                row += len(block)
        yield path, array


def cast_into(target: np.ndarray, block: np.ndarray, name: str, file: str) -> None:
    """Copies `block` into `target`, cast to its dtype. Raises CheckpointError if a number is then not finite."""
    with np.errstate(over="ignore"):  # the error below names the tensor
        target[...] = block
    if np.isfinite(target).all():
        return
    if np.isfinite(block).all():
        largest = float(np.abs(block.astype(np.float32)).max())
        raise CheckpointError(
            f"{file}: tensor {name} reaches {largest:.6g}, too large for {target.dtype}; load it as bfloat16 or float32"
        )
    raise CheckpointError(f"{file}: tensor {name} holds infinities or NaNs; every weight must be a finite number")


def load_parameters(config: ModelConfig, arrays: Iterator[tuple[str, np.ndarray]]) -> tuple[dict, str]:
    """Puts parameters on JAX's default device: (parameter tree, identity of the model).

    On a CPU the arrays are not copied. The identity is a short hash of the configuration and of a sample of every
    parameter. It is the same whether a checkpoint is read as float32 or bfloat16, and differs between models.

    Args:
        config: the model's configuration.
        arrays: pairs (path of the parameter, array on the host).
    """
    params: dict[str, Any] = {}
    samples: dict[str, str] = {}
    for path, array in arrays:
        *branches, leaf = path.split("/")
        node = params
        for branch in branches:
            node = node.setdefault(branch, {})
        samples[path] = _sample(array)
        node[leaf] = jax.device_put(array)
    return params, _identity(config, samples)


def identify(config: ModelConfig, arrays: Iterator[tuple[str, np.ndarray]]) -> str:
    """The identity that `load_parameters` gives a model. The arrays are read one by one and not kept."""
    return _identity(config, {path: _sample(array) for path, array in arrays})


def _identity(config: ModelConfig, samples: Mapping[str, str]) -> str:
    digest = sha256(json.dumps([asdict(config), sorted(samples.items())], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _sample(array: np.ndarray) -> str:
    step = max(1, array.size // _SAMPLES)
    return sha256(array.reshape(-1)[::step].astype(jnp.bfloat16).tobytes()).hexdigest()


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array, aligned so that jax.device_put does not copy it on a CPU."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _check_names_and_shapes(
    config: ModelConfig, source: TensorSource, layout: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> None:
    expected = {name: shape for parts in layout.values() for name, shape in parts.items()}
    found = source.shapes
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(f"{source.file_of(name)}: tensor {name} of shape {shape} is missing")
        if tuple(found[name]) != shape:
            raise CheckpointError(
                f"{source.file_of(name)}: tensor {name} has shape {tuple(found[name])}; the configuration says {shape}"
            )
    extra = [name for name in found if name not in expected and not _HARMLESS.search(name)]
    if config.tie_embeddings and "lm_head.weight" in extra:
        _check_tied(source)
        extra.remove("lm_head.weight")
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise CheckpointError(
            f"{source.file_of(extra[0])}: tensor {extra[0]}{more} is not part of a {config.architecture} decoder with "
            f"{config.num_layers} layers, qkv_bias={config.qkv_bias}, tie_embeddings={config.tie_embeddings}"
        )


def _check_tied(source: TensorSource) -> None:
    same_shape = source.shapes["lm_head.weight"] == source.shapes["model.embed_tokens.weight"]
    pairs = zip(source.blocks("lm_head.weight"), source.blocks("model.embed_tokens.weight"), strict=True)
    if not same_shape or not all(np.array_equal(head, embedding) for head, embedding in pairs):
        raise CheckpointError(
            f"{source.file_of('lm_head.weight')}: lm_head.weight differs from model.embed_tokens.weight, "
            "but the configuration says tie_word_embeddings"
        )
