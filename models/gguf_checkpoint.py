"""A GGUF file (the format of llama.cpp) as a model: its configuration, and its weights, dequantised block by block."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from hshare_jax.errors import CheckpointError
from hshare_jax.kernels.block_weights import BLOCK, BlockWeights
from hshare_jax.models.config import ModelConfig, RopeConfig, check_num_layers
from hshare_jax.models.gguf_file import GGUFFile, GGUFTensor
from hshare_jax.models.weights import ALL, BLOCK_BYTES

ARCHITECTURES = ("llama", "qwen2", "qwen3", "smollm3", "phi3")  # llama.cpp calls Mistral llama too
_ROPE_DIVISORS = "rope_freqs.weight"
_LONGROPE = "rope_factors_long.weight"
_SMOLLM3_INTERVAL = 4  # each fourth layer has no rotary embedding; llama.cpp keeps this in its code, not in the file
_PERMUTED = re.compile(r"blk\.\d+\.attn_[qk]\.(weight|bias)$")
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip
_PHI3_NAMES = {**_LAYER_NAMES, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}


def config_from_gguf(file: GGUFFile) -> ModelConfig:
    """Reads the configuration from the metadata and the tensor table of a GGUF file.

    Raises:
        ValueError: this decoder does not compute the architecture or the rotary scaling.
        CheckpointError: an entry is missing or of a wrong type, or sizes contradict each other.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{file.path}: general.architecture={architecture!r} is not supported; known: {', '.join(ARCHITECTURES)}"
        )
    entries = _Entries(file, f"{architecture}.")
    width, num_heads, num_layers = (
        entries.size("embedding_length"), entries.size("attention.head_count"), entries.size("block_count"),
    )  # fmt: skip
    try:
        check_num_layers("block_count", num_layers)
    except ValueError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    if "attention.key_length" not in entries and width % num_heads:
        raise CheckpointError(
            f"{file.path}: embedding_length={width} is not a multiple of attention.head_count={num_heads}"
        )
    head_dim = entries.size("attention.key_length", width // num_heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if entries.size(name, head_dim) != head_dim:
            raise CheckpointError(
                f"{file.path}: {name}={entries.size(name, head_dim)} must equal the head size {head_dim}"
            )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path}: tensor token_embd.weight is missing")
    names = file.tensors.keys()
    if _LONGROPE in names:
        raise ValueError(f"{file.path}: tensor {_LONGROPE}: rope scaling 'longrope' is not supported")
    # 0: no window. Old files of phi3 lack this number, and only some of these models have no window.
    defaults = {"llama": 0, "phi3": None}
    window = entries.size("attention.sliding_window", defaults[architecture]) if architecture in defaults else 0
    no_rope_layers = range(_SMOLLM3_INTERVAL - 1, num_layers, _SMOLLM3_INTERVAL) if architecture == "smollm3" else ()
    try:
        rope = _rope(file, entries)
        return ModelConfig(
            vocab_size=entries.size("vocab_size", embedding.shape[0]),
            width=width,
            mlp_width=entries.size("feed_forward_length"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=entries.size("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            max_positions=rope.max_positions(entries.size("context_length")),
            windows=(window or None,) * num_layers,
            rope=rope,
            norm_eps=entries.number("attention.layer_norm_rms_epsilon"),
            qkv_bias="blk.0.attn_q.bias" in names,
            out_bias="blk.0.attn_output.bias" in names,
            mlp_bias="blk.0.ffn_down.bias" in names,
            tie_embeddings="output.weight" not in names,
            architecture=architecture,
            qk_norm=architecture == "qwen3",
            no_rope_layers=tuple(no_rope_layers),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{file.path}: {error}") from error


class _Entries:
    """The metadata entries of one architecture, read with a check of their type."""

    def __init__(self, file: GGUFFile, prefix: str) -> None:
        self._file, self._prefix = file, prefix

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._file.metadata

    def _get(self, name: str, kind: type | tuple[type, ...], default: Any) -> Any:
        value = self._file.metadata.get(self._prefix + name, default)
        if isinstance(value, list) and value:  # one for each layer
            if len(set(value)) > 1:
                raise ValueError(
                    f"{self._file.path}: metadata {self._prefix}{name} differs between layers "
                    f"({', '.join(map(str, dict.fromkeys(value)))}), which is not supported"
                )
            value = value[0]
        if not isinstance(value, kind) or isinstance(value, bool):
            found = "is missing" if value is None else f"is {value!r}"
            raise CheckpointError(f"{self._file.path}: metadata {self._prefix}{name} {found}")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        return self._get(name, int, default)

    def number(self, name: str, default: float | None = None) -> float:
        # The file stores a float32. Its shortest decimal (1e-05, not 9.999999747e-06) is what the authors wrote.
        value = float(str(np.float32(self._get(name, (int, float), default))))
        if not math.isfinite(value) or value <= 0:
            raise CheckpointError(
                f"{self._file.path}: metadata {self._prefix}{name}={value} must be positive and finite"
            )
        return value

    def text(self, name: str, default: str) -> str:
        return self._get(name, str, default)


def _rope(file: GGUFFile, entries: _Entries) -> RopeConfig:
    theta = entries.number("rope.freq_base", 10_000.0)
    kind = entries.text("rope.scaling.type", "linear" if "rope.scale_linear" in entries else "none")
    factor = entries.number("rope.scaling.factor", entries.number("rope.scale_linear", 1.0))
    positions = entries.size("rope.scaling.original_context_length", entries.size("context_length"))
    divisors = _rope_divisors(file)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return RopeConfig(theta=theta, original_max_positions=positions, divisors=divisors)
    if divisors is not None:
        raise ValueError(f"{file.path}: rope scaling {kind!r} together with {_ROPE_DIVISORS} is not supported")
    if kind == "linear":
        return RopeConfig("linear", theta, factor, positions)
    if kind == "yarn":
        # llama.cpp multiplies yarn's usual factor on queries and keys by attn_factor.
        attention_factor = None
        if "rope.scaling.attn_factor" in entries:
            attention_factor = entries.number("rope.scaling.attn_factor") * (0.1 * math.log(max(factor, 1.0)) + 1.0)
        return RopeConfig(
            "yarn",
            theta,
            factor,
            positions,
            beta_fast=entries.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=entries.number("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=attention_factor,
        )
    known = f"none, linear, yarn, {_ROPE_DIVISORS}"
    raise ValueError(f"{file.path}: rope scaling {kind!r} is not supported; supported: {known}")


def _rope_divisors(file: GGUFFile) -> tuple[float, ...] | None:
    if _ROPE_DIVISORS not in file.tensors:
        return None
    divisors = np.concatenate(list(_blocks(file, _ROPE_DIVISORS, 1, ALL))).reshape(-1)
    if not (np.isfinite(divisors).all() and (divisors > 0).all()):
        raise CheckpointError(f"{file.path}: tensor {_ROPE_DIVISORS} must hold positive, finite numbers")
    return tuple(divisors.tolist())


def _blocks(file: GGUFFile, name: str, row_multiple: int, rows: slice) -> Iterator[np.ndarray]:
    """Reads rows of a tensor as float32, in blocks of a multiple of `row_multiple` rows. A vector is one block."""
    from gguf.quants import dequantize  # here, because most starts of the program read no GGUF file

    tensor = file.tensors[name]
    num_rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
    row_bytes = tensor.num_bytes // max(num_rows, 1)
    step = max(BLOCK_BYTES // max(4 * math.prod(tensor.shape) // max(num_rows, 1), 1) // row_multiple, 1) * row_multiple
    wanted = range(num_rows)[rows] if len(tensor.shape) > 1 else range(1)
    with open(tensor.path, "rb") as data:
        for row in range(wanted.start, wanted.stop, step):
            count = min(step, wanted.stop - row)
            data.seek(tensor.offset + row * row_bytes)
            packed = np.frombuffer(data.read(count * row_bytes), np.uint8).reshape(count, row_bytes)
            try:
                block = dequantize(_typed(packed, tensor), tensor.kind)
            except NotImplementedError as error:
                raise ValueError(
                    f"{tensor.path}: tensor {name} is stored as {tensor.kind.name}, which cannot be read"
                ) from error
            yield (
                block.reshape(count, *tensor.shape[1:]) if len(tensor.shape) > 1 else block.reshape(tensor.shape)[rows]
            )


def _typed(packed: np.ndarray, tensor: GGUFTensor) -> np.ndarray:
    """Bytes of a tensor in the dtype that `dequantize` expects: floats for float32 and float16, else bytes."""
    plain = {"F32": "<f4", "F16": "<f2"}
    return packed.view(plain[tensor.kind.name]) if tensor.kind.name in plain else packed


def _read_codes(file: GGUFFile, name: str) -> BlockWeights | None:
    """A tensor of type Q4_0, Q4_1 or Q8_0 as it is stored; None for other types and for vectors.

    A block of 32 weights is a float16 scale, in Q4_1 a float16 minimum, and the codes.
    """
    tensor = file.tensors[name]
    if tensor.kind.name not in ("Q4_0", "Q4_1", "Q8_0") or len(tensor.shape) != 2:
        return None
    with open(tensor.path, "rb") as data:
        data.seek(tensor.offset)
        packed = np.frombuffer(data.read(tensor.num_bytes), np.uint8)
    out, D = tensor.shape
    blocks = packed.reshape(out, D // BLOCK, -1)
    scale = blocks[..., :2].copy().view("<f2")[..., 0]
    if tensor.kind.name == "Q8_0":
        return BlockWeights(blocks[..., 2:].reshape(out, D).view(np.int8), scale, None)
    has_minimum = tensor.kind.name == "Q4_1"
    with np.errstate(over="ignore"):
        minimum = blocks[..., 2:4].copy().view("<f2")[..., 0] if has_minimum else np.float16(-8) * scale
    if not np.isfinite(minimum[np.isfinite(scale)]).all():
        return None  # a scale above 8,188; read as floats, which can tell
    return BlockWeights(blocks[..., 4 if has_minimum else 2 :].reshape(out, D // 2), scale, minimum)


class GGUFTensors:
    """The tensors of a GGUF file under their Hugging Face names (a `TensorSource`)."""

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self._file, self._head_dim = file, config.head_dim
        # llama.cpp rotates neighbouring channels in these architectures, so converters permute the rows of q and k.
        self._is_permuted = config.architecture in ("llama", "smollm3")
        known = _PHI3_NAMES if config.architecture == "phi3" else _LAYER_NAMES
        self._names = {_hf_name(name, known): name for name in file.tensors if name != _ROPE_DIVISORS}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: self._file.tensors[stored].shape for name, stored in self._names.items()}

    def file_of(self, name: str) -> str:
        return self._file.tensors[self._names[name]].path if name in self._names else self._file.path

    def blocks(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Iterator[np.ndarray]:
        stored = self._names[name]
        is_permuted = self._is_permuted and _PERMUTED.match(stored)
        for block in _blocks(self._file, stored, self._head_dim if is_permuted else 1, rows):  # whole heads
            block = self._permute(block) if is_permuted else block
            yield block[:, columns] if block.ndim > 1 else block

    def codes(self, name: str) -> BlockWeights | None:
        stored = self._names[name]
        found = _read_codes(self._file, stored)
        if found is not None and self._is_permuted and _PERMUTED.match(stored):
            return jax.tree.map(self._permute, found)
        return found

    def _permute(self, rows: np.ndarray) -> np.ndarray:
        """Rows of whole heads in the order of Hugging Face."""
        half = self._head_dim // 2
        return rows.reshape(-1, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _hf_name(name: str, known: Mapping[str, str]) -> str:
    """The Hugging Face name of a GGUF tensor, by the `known` names in a layer. Any other name stays as it is."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{kind}"
    match = re.match(r"blk\.(\d+)\.(\w+)$", stem)
    if match and match[2] in known:
        return f"model.layers.{match[1]}.{known[match[2]]}.{kind}"
    return name
