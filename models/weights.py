"""Loading of weights: the tensors of a checkpoint, under their Hugging Face names, become the parameter tree.

A checkpoint format is a `TensorSource`, which hands out a tensor in blocks of rows. Beside the finished parameters only
one block is in memory, and the largest parameters are read first, while memory holds little else. On a mesh each
process reads the rows and columns that its own devices hold, one device at a time. Weights in few bits are small: the
parameter that is read is whole in memory.

Query, key and value projections are one array, and so are gate and up. This saves three products in each layer, and XLA
would otherwise concatenate the weights on every call. Their rows are mixed so that devices can divide heads, and pairs
of gate and up (`row_order`).
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int

from hshare_jax.errors import CheckpointError, SettingError
from hshare_jax.kernels.block_weights import BLOCK, BlockWeights, quantise_blocks, quantise_channels
from hshare_jax.kernels.implementations import multiplies_codes
from hshare_jax.mesh import num_parts, to_host
from hshare_jax.models.config import ModelConfig
from hshare_jax.models.decoder import layout_of_parameter
from hshare_jax.models.layers import qkv_rows

DType = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DType, ...] = ("float32", "bfloat16", "float16")
# The bits of weight matrices. auto: stored where an implementation multiplies with them as they are, else none.
# stored: those of the file. none: floats. int8: codes of 8 bits for the matrices that the file does not keep in codes.
# int8-channel: as int8, with one scale for each output, which suits GPUs.
Quantize = Literal["auto", "stored", "none", "int8", "int8-channel"]
QUANTIZE: tuple[Quantize, ...] = get_args(Quantize)
Parameter = np.ndarray | Array | BlockWeights  # on the host, or on a mesh
BLOCK_BYTES = 16 << 20

# Buffers of rotary angles that old versions of transformers saved. The decoder computes these itself.
_ROTARY_BUFFER = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
ALL = slice(None)
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

    def blocks(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Iterator[np.ndarray]:
        """Reads these rows of tensor `name` in order, in blocks of about `BLOCK_BYTES`. A vector has no columns."""
        ...

    def codes(self, name: str) -> BlockWeights | None:
        """Reads tensor `name` in the few bits that it is stored in; None if it is stored otherwise."""
        ...


def is_rotary_buffer(name: str) -> bool:
    """Whether a tensor is a buffer that the decoder computes itself, so that the tensor is not read."""
    return _ROTARY_BUFFER.search(name) is not None


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
    if config.architecture == "phi3":  # whose files hold these projections stacked already
        own["qkv"] = ({"self_attn.qkv_proj": queries + 2 * keys}, D, config.qkv_bias)
        rest["mlp/gate_up"] = ({"mlp.gate_up_proj": 2 * F}, D, config.mlp_bias)
    for layer in range(config.num_layers):
        ours, theirs = f"layers_{layer}", f"model.layers.{layer}"
        layout[f"{ours}/attention_norm/scale"] = {f"{theirs}.input_layernorm.weight": (D,)}
        layout[f"{ours}/mlp_norm/scale"] = {f"{theirs}.post_attention_layernorm.weight": (D,)}
        if config.qk_norm:
            for name in ("q_norm", "k_norm") if layer in config.kv_layers else ("q_norm",):
                layout[f"{ours}/{name}/scale"] = {f"{theirs}.self_attn.{name}.weight": (config.head_dim,)}
        projections = (own if layer in config.kv_layers else shared) | rest
        for name, (parts, inputs, has_bias) in projections.items():
            layout[f"{ours}/{name}/weight"] = {f"{theirs}.{part}.weight": (out, inputs) for part, out in parts.items()}
            if has_bias:
                layout[f"{ours}/{name}/bias"] = {f"{theirs}.{part}.bias": (out,) for part, out in parts.items()}
    return layout


def row_order(config: ModelConfig, path: str, parts: int = 1) -> Int[np.ndarray, "rows"] | None:
    """For each row of a parameter its row in the stack of the tensors that make it up; None if they are the same rows.

    Args:
        config: the configuration of the files.
        path: of the parameter.
        parts: over how many devices heads will be divided. With more devices than kv heads, the rows of a kv head come
            several times (`ModelConfig.for_parts`).
    """
    *_, name, _ = ["", *path.split("/")]
    if name == "gate_up":
        return np.arange(2 * config.mlp_width).reshape(2, -1).T.reshape(-1)
    if name != "qkv":
        return None
    wide = config.for_parts(parts)
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    order = np.empty((N + 2 * wide.num_kv_heads) * H, np.int64)
    kv = np.arange(K * H).reshape(K, H).repeat(wide.num_kv_heads // K, axis=0).reshape(-1)
    for rows, own in zip(qkv_rows(wide), (np.arange(N * H), N * H + kv, (N + K) * H + kv), strict=True):
        order[rows] = own
    return order


def repeated_kv_rows(config: ModelConfig, parts: int) -> Int[np.ndarray, "rows"]:
    """The rows of `qkv` for a number of devices, among its rows for one: a kv head may come several times."""
    of_stack = np.argsort(row_order(config, "qkv/weight"))
    return of_stack[row_order(config, "qkv/weight", parts)]


def resolve_quantize(quantize: Quantize, config: ModelConfig) -> Quantize:
    """What `quantize` means here: any of its values but `auto`.

    Args:
        quantize: what is asked for.
        config: the model, or the part of it that a device has.

    Raises:
        SettingError: an unknown name, or blocks of weights that the rows of the model, or a device's part of them, do
            not hold whole.
    """
    if quantize not in QUANTIZE:
        raise SettingError("quantize", quantize, f"must be one of {', '.join(QUANTIZE)}")
    cut = [width for width in (config.width, config.mlp_width, config.num_heads * config.head_dim) if width % BLOCK]
    if quantize == "auto":
        return "stored" if multiplies_codes() and not (cut and config.is_part) else "none"
    if cut and (quantize == "int8" or (quantize == "stored" and config.is_part)):
        owner = "a device's part" if config.is_part else "this model"
        rule = f"takes blocks of {BLOCK} neighbouring weights, and {owner} has rows of {cut[0]}"
        raise SettingError("quantize", quantize, rule, "choose 'none'")
    return quantize


def stream_parameters(
    config: ModelConfig,
    source: TensorSource,
    dtype: DType,
    quantize: Quantize = "none",
    mesh: Mesh | None = None,
) -> Iterator[tuple[str, Parameter]]:
    """Reads all parameters, the largest first: yields (path, parameter on the host, or on a mesh).

    Vectors are in `dtype`. Unless `quantize` is `none`, a matrix stays in few bits if its tensors are all stored so, in
    codes of the same size.

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
        order = row_order(config, path, num_parts(mesh))
        if order is None:
            order = np.arange(sum(shape[0] for shape in parts.values()))
        codes = None if quantize == "none" else _stored_codes(source, list(parts))

        def read(
            rows: slice = ALL, columns: slice = ALL, *, parts: Mapping = parts, order: np.ndarray = order,
            codes: BlockWeights | None = codes,
        ) -> Parameter:  # fmt: skip
            if codes is not None:
                return dataclasses.replace(part_of(codes, order[rows], columns), dtype=target)
            return quantise(_read_rows(source, parts, order[rows], columns, target), target, quantize)

        if mesh is None:
            yield path, read()
        else:
            yield path, place(read, path, (len(order), *next(iter(parts.values()))[1:]), mesh)


def _read_rows(
    source: TensorSource,
    parts: Mapping[str, tuple[int, ...]],
    order: Int[np.ndarray, "rows"],
    columns: slice,
    dtype: np.dtype,
) -> np.ndarray:
    """Rows of a stack of tensors, in this order."""
    widths = [len(range(width)[columns]) for width in next(iter(parts.values()))[1:]]
    array, first = aligned_empty((len(order), *widths), dtype), 0
    for name, (height, *_) in parts.items():
        places = np.flatnonzero((order >= first) & (order < first + height))
        wanted, first = order[places] - first, first + height
        if len(places) == 0:
            continue
        row, end = int(wanted.min()), int(wanted.max()) + 1
        for block in source.blocks(name, slice(row, end), columns):
            is_here = (wanted >= row) & (wanted < row + len(block))
            into, rows = _as_slice(places[is_here]), _as_slice(wanted[is_here] - row)
            cast = array[into]  # a view of consecutive rows, a copy of others
            cast_into(cast, block[rows], name, source.file_of(name))
            if not isinstance(into, slice):
                array[into] = cast
            row += len(block)
    return array


def _as_slice(index: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"] | slice:
    """An index of an array as a slice, if its numbers are consecutive."""
    is_consecutive = len(index) > 0 and (np.diff(index) == 1).all()
    return slice(int(index[0]), int(index[-1]) + 1) if is_consecutive else index


def part_of(whole: Parameter, order: Int[np.ndarray, "rows"], columns: slice) -> Parameter:
    """Rows of a parameter on the host, in this order, and of a matrix these columns (in few bits: whole blocks)."""
    if len(whole.shape) == 1:
        return whole[order]
    width = whole.shape[1]

    def part(array: np.ndarray) -> np.ndarray:
        size, start, stop = array.shape[1], *columns.indices(width)[:2]
        rows = array[_as_slice(order)]
        chosen = rows[:, start * size // width : stop * size // width] if size > 1 else rows
        out = aligned_empty(chosen.shape, array.dtype)
        out[...] = chosen
        return out

    return jax.tree.map(part, whole)


def place(read: Callable[[slice, slice], Parameter], path: str, shape: tuple[int, ...], mesh: Mesh) -> Any:
    """A parameter on a mesh, of which this process reads what its own devices hold, one part at a time.

    Args:
        read: reads rows and columns.
        path: of the parameter.
        shape: of the whole parameter.
        mesh: the devices.
    """
    spec = layout_of_parameter(path, shape, num_parts(mesh)).spec
    sharding = NamedSharding(mesh, spec)
    held: dict[tuple, list[Any]] = {}  # the devices of each part; those with the same rows and columns share a reading
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        held.setdefault(tuple((part.start, part.stop) for part in index or ()), []).append(device)
    leaves, tree, local = [], None, shape
    for bounds, devices in held.items():
        part = read(*(slice(*ends) for ends in bounds))
        tree, local = jax.tree.structure(part), part.shape
        leaves += [[jax.device_put(leaf, device) for leaf in jax.tree.leaves(part)] for device in devices]
    wholes = []
    for arrays in zip(*leaves, strict=True):
        whole = tuple(size * all_of // own for size, all_of, own in zip(arrays[0].shape, shape, local, strict=True))
        wholes.append(jax.make_array_from_single_device_arrays(whole, sharding, list(arrays)))
    assert tree is not None
    return jax.tree.unflatten(tree, wholes)


def quantise(array: np.ndarray, dtype: np.dtype, quantize: Quantize) -> Parameter:
    """A parameter of floats in the bits that `quantize` asks for."""
    if array.ndim == 1 or quantize not in ("int8", "int8-channel"):
        return array
    return (quantise_blocks if quantize == "int8" else quantise_channels)(array, dtype)


def _stored_codes(source: TensorSource, names: list[str]) -> BlockWeights | None:
    """The tensors, stacked, in the few bits that all of them are stored in alike; None if they are not."""
    found = []
    for name in names:
        codes = source.codes(name)
        if codes is None or (found and jax.tree.structure(codes) != jax.tree.structure(found[0])):
            return None
        if found and codes.qvalue.dtype != found[0].qvalue.dtype:
            return None
        for array in (codes.scale, codes.minimum):
            if array is not None and not np.isfinite(array).all():
                raise _not_finite(name, source.file_of(name))
        found.append(codes)
    return jax.tree.map(lambda *arrays: _stack(arrays), *found)


def _stack(arrays: Sequence[np.ndarray]) -> np.ndarray:
    out = aligned_empty((sum(map(len, arrays)), *arrays[0].shape[1:]), arrays[0].dtype)
    return np.concatenate(arrays, out=out)


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
    raise _not_finite(name, file)


def _not_finite(name: str, file: str) -> CheckpointError:
    return CheckpointError(f"{file}: tensor {name} holds infinities or NaNs; every weight must be a finite number")


def load_parameters(config: ModelConfig, arrays: Iterator[tuple[str, Parameter]]) -> tuple[dict, str]:
    """Puts parameters on JAX's default device, unless they lie on a mesh: (parameter tree, identity of the model).

    On a CPU floats are not copied. The identity is a short hash of the configuration and of a sample of every
    parameter. It is the same whether a checkpoint is read as float32 or bfloat16, or in the bits that it is stored in,
    and differs between models.

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
        node[leaf] = jax.tree.map(lambda part: part if isinstance(part, jax.Array) else jax.device_put(part), array)
    return params, _identity(config, samples)


def identify(config: ModelConfig, arrays: Iterator[tuple[str, Parameter]]) -> tuple[str, int]:
    """The identity that `load_parameters` gives a model, and the bytes of all parameters, which are not kept."""
    samples, size = {}, 0
    for path, array in arrays:
        samples[path] = _sample(array)
        size += sum(leaf.nbytes for leaf in jax.tree.leaves(array))
    return _identity(config, samples), size


def _identity(config: ModelConfig, samples: Mapping[str, str]) -> str:
    # A field that came later leaves no trace while it has its default, so that calibration files go on to fit.
    later = ("qk_norm", "no_rope_layers", "num_parts")
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in later}
    fields |= {name: value for name in later if (value := getattr(config, name)) != getattr(ModelConfig, name)}
    digest = sha256(json.dumps([fields, sorted(samples.items())], sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _sample(array: Parameter) -> str:
    size = math.prod(array.shape)
    places = np.unravel_index(np.arange(0, size, max(1, size // _SAMPLES)), array.shape)
    if isinstance(array, BlockWeights):
        rows, columns = places
        values = to_host(array[rows].to_floats())[np.arange(len(rows)), columns]
    else:
        values = to_host(array[places])
    return sha256((values + 0).astype(jnp.bfloat16).tobytes()).hexdigest()  # -0 becomes 0


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
    extra = [name for name in found if name not in expected and not is_rotary_buffer(name)]
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
