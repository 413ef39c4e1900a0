"""Our own checkpoint format: a directory with parameters (by Orbax), configuration, tokenizer and checksums.

    model.json      configuration, dtype, ids that end a generation, name
    params/         Orbax, uncompressed: random mantissas do not compress, and this loads faster
    tokenizer/      as transformers saves it, chat template included; absent for a model without one
    SHA256SUMS      of all the files above

Other files may lie beside these: a plan, results, notes. They are neither read nor checked, and stay where a checkpoint
is overwritten. The directory is written as a draft and renamed, so a checkpoint is never half-written. Before Orbax
reads a checkpoint, every file is compared with its checksum, because Orbax neither notices flipped bits nor warns of a
wrong dtype.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import tree
from jax.sharding import Mesh, NamedSharding

from hshare_jax.errors import CheckpointError
from hshare_jax.files.atomic import whole_directory
from hshare_jax.files.checksums import verify_all
from hshare_jax.files.texts import check_path, parse_json
from hshare_jax.kernels.block_weights import BLOCK, BlockWeights
from hshare_jax.mesh import num_parts
from hshare_jax.models.config import ModelConfig, RopeConfig
from hshare_jax.models.decoder import layout_of_parameter
from hshare_jax.models.weights import (
    ALL,
    DType,
    Parameter,
    Quantize,
    aligned_empty,
    cast_into,
    dtype_of,
    part_of,
    place,
    quantise,
    repeated_kv_rows,
    tensor_layout,
)

if TYPE_CHECKING:
    from orbax.checkpoint import v1 as ocp
    from transformers import PreTrainedTokenizerBase

# Orbax and transformers are imported by the functions that need them, because importing them takes a second.

_PARTS = _MODEL, _PARAMS, _TOKENIZER = "model.json", "params", "tokenizer"
_FORMAT = 2  # since 2 the rows of projections are mixed (`weights.row_order`)
_ERROR_CODE = re.compile(r"os_error_code='(\d+)'|\(os error (\d+)\)")  # in tensorstore's errors, in tokenizers'
_BLOCK_ARRAYS = ("qvalue", "scale", "minimum")  # of weights in few bits, as `BlockWeights` names them
# How many parts a checkpoint is read in. A call of Orbax takes some 20 ms, and the memory of large parts returns to the
# system only slowly.
_GROUPS = 24
_LONGEST_PATH = 4096  # bytes
_COMPRESSED = 0.4  # of the bytes of weights at least are written; float32 numbers that were bfloat16 halve


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """The contents of model.json: everything in a checkpoint except its arrays and its tokenizer."""

    config: ModelConfig
    dtype: DType
    eos_token_ids: tuple[int, ...]
    name: str


def is_orbax_directory(directory: Path) -> bool:
    """Whether `directory` looks like one of our checkpoints. Only model.json is looked for."""
    return (directory / _MODEL).is_file()


def save_checkpoint(
    path: str | os.PathLike[str],
    info: CheckpointInfo,
    params: Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint directory at `path`, completely or not at all.

    Each process writes the parts of parameters that its devices hold; the first one writes all else. All of them must
    call this, and reach the same directory.

    Args:
        path: the directory to write.
        info: the contents of model.json.
        params: the parameter tree.
        tokenizer: the tokenizer; None for a model without one.
        overwrite: whether to replace a checkpoint at `path`. Other files in that directory stay.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False, or `path` is not one of our checkpoints.
        ValueError: the parameters do not have the shapes of `info.config` or the dtype `info.dtype`, or became
            `int8-channel` on a mesh; or the path is not UTF-8.
    """
    check_path(path)
    path = Path(os.path.expanduser(path)).absolute()  # Orbax asks for absolute paths
    if path.exists() and not (overwrite and is_orbax_directory(path)):
        way_out = (
            "it is not a checkpoint of this library" if overwrite else "choose another path, or ask to overwrite it"
        )
        raise FileExistsError(f"{path} exists; {way_out}")
    _check_arrays(info, params)
    with _draft_of_all_processes(path, overwrite) as draft:
        write_arrays(draft / _PARAMS, tree.map(_as_stored, params, is_leaf=_is_blocks))
        if jax.process_index() > 0:
            return
        if tokenizer is not None:
            with _system_errors(draft / _TOKENIZER):
                tokenizer.save_pretrained(draft / _TOKENIZER)
        (draft / _MODEL).write_text(json.dumps({"format": _FORMAT, **dataclasses.asdict(info)}, indent=1) + "\n")


@contextlib.contextmanager
def _draft_of_all_processes(path: Path, overwrite: bool) -> Iterator[Path]:
    """`whole_directory`, by the first process: all fill its draft, and it becomes `path` when all have done so."""
    if jax.process_index() == 0:
        with whole_directory(path, parts=_PARTS, overwrite=overwrite) as draft:
            _told_by_first(os.fsencode(draft))
            yield draft
            _wait_for_all("filled")
    else:
        yield Path(os.fsdecode(_told_by_first(b"")))
        _wait_for_all("filled")
    _wait_for_all("in place")


def _told_by_first(data: bytes) -> bytes:
    """The first process' bytes, at most a path's, in every process."""
    if jax.process_count() == 1:
        return data
    from jax.experimental.multihost_utils import broadcast_one_to_all

    padded = np.frombuffer(data.ljust(_LONGEST_PATH, b"\0"), np.uint8)
    return np.asarray(broadcast_one_to_all(padded)).astype(np.uint8).tobytes().rstrip(b"\0")


def _wait_for_all(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(name)


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes a tree of arrays with Orbax. Raises OSError, which names the path, if the system cannot write."""
    from orbax.checkpoint import v1 as ocp

    # Asked first, because when a disk turns out to be full each thread of Orbax prints a traceback of its own.
    needed = int(_COMPRESSED * sum(leaf.nbytes for leaf in tree.leaves(arrays)))
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        reason = f"{os.strerror(errno.ENOSPC)}: at least {needed:,} bytes are needed, {free:,} are free"
        raise OSError(errno.ENOSPC, reason, str(path))
    with orbax_context(), _system_errors(path):
        ocp.save(str(path), arrays)


@contextlib.contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    """Within this context an error whose text holds the system's error code is an OSError that names `path`."""
    try:
        yield
    except Exception as error:
        # tensorstore raises ValueError, and the tokenizers library Exception itself, which no narrower clause catches.
        if isinstance(error, OSError) or (code := _ERROR_CODE.search(str(error))) is None:
            raise
        number = int(code[1] or code[2])
        raise OSError(number, os.strerror(number), str(path)) from error


def read_checkpoint_info(directory: Path) -> CheckpointInfo:
    """Reads model.json. Raises CheckpointError if any file of the checkpoint differs from its checksum."""
    verify_all(directory, _PARTS)
    path = directory / _MODEL
    try:
        found = parse_json(path.read_bytes())
        if found.pop("format") != _FORMAT:
            raise CheckpointError(
                f"{path} has another format than {_FORMAT}; write the checkpoint anew with this version"
            )
        rope = found["config"].pop("rope")
        rope["divisors"] = rope["divisors"] and tuple(rope["divisors"])
        fields = found.pop("config")
        for name in ("windows", "kv_layer_map"):
            fields[name] = fields.get(name) and tuple(fields[name])  # JSON has no tuples
        fields["no_rope_layers"] = tuple(fields.get("no_rope_layers", ()))
        config = ModelConfig(**fields, rope=RopeConfig(**rope))
        dtype_of(found["dtype"])
        return CheckpointInfo(config=config, eos_token_ids=tuple(found.pop("eos_token_ids")), **found)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} does not describe a model: {error}") from error


def read_checkpoint_tokenizer(directory: Path) -> "PreTrainedTokenizerBase | None":
    """Reads the tokenizer of a checkpoint. None if it has none."""
    path = directory / _TOKENIZER
    if not path.is_dir():
        return None
    # Not AutoTokenizer, which imports torch if that is installed. Every saved tokenizer has a tokenizer.json.
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)


def _is_blocks(leaf: Any) -> bool:
    return isinstance(leaf, BlockWeights)


def _as_stored(parameter: Any) -> Any:
    """A parameter as it lies in params/: an array, or the arrays of weights in few bits under their names."""
    if not _is_blocks(parameter):
        is_spread = isinstance(parameter, jax.Array) and len(parameter.sharding.device_set) > 1
        return parameter if is_spread else np.asarray(parameter)
    arrays = {name: getattr(parameter, name) for name in _BLOCK_ARRAYS}
    return {name: _as_stored(array) for name, array in arrays.items() if array is not None}


def stream_checkpoint(
    directory: Path, info: CheckpointInfo, dtype: DType, quantize: Quantize, mesh: Mesh | None = None
) -> Iterator[tuple[str, Parameter]]:
    """Reads all parameters: yields (path, parameter on the host, or on a mesh), as `stream_parameters` does.

    For one device they are read in about `_GROUPS` parts. On a mesh each process reads what its own devices hold, one
    parameter at a time.

    Raises:
        CheckpointError: a parameter is missing, or its shape or dtype is not what model.json says.
    """
    from orbax.checkpoint import v1 as ocp

    shapes = _parameter_shapes(info.config)
    stored, target = dtype_of(info.dtype), dtype_of(dtype)
    where = str((directory / _PARAMS).absolute())
    found = ocp.metadata(where).metadata
    _check_stored(directory, found, shapes, stored)
    if mesh is not None:
        yield from _stream_to_mesh(directory, info.config, found, mesh, target, quantize)
        return
    for paths in _groups(shapes):
        wanted: dict[str, Any] = {}
        for path in paths:
            # Orbax uses only the shape and the dtype.
            _put(wanted, path, tree.map(lambda array: np.empty(array.shape, array.dtype), _get(found, path)))
        with orbax_context():
            loaded = ocp.load(where, wanted)
        for path in paths:
            yield path, _as_asked(_get(loaded, path), shapes[path], target, quantize, path, str(directory))


def _stream_to_mesh(
    directory: Path, config: ModelConfig, found: Any, mesh: Mesh, dtype: np.dtype, quantize: Quantize
) -> Iterator[tuple[str, Parameter]]:
    """All parameters on a mesh, the largest first; `found` is Orbax's description of the stored arrays.

    What lies on the devices as it is stored is read so, each process its own part. What is converted on the way is read
    whole first.
    """
    shapes, parts = _parameter_shapes(config), num_parts(mesh)
    wide = config.for_parts(parts)
    for path in sorted(shapes, key=lambda path: -math.prod(shapes[path])):
        stored, shape = _get(found, path), shapes[path]
        is_blocks, is_qkv = isinstance(stored, Mapping), path.split("/")[-2:-1] == ["qkv"]
        is_converted = quantize == "none" if is_blocks else len(shape) > 1 and quantize in ("int8", "int8-channel")
        if is_converted or (is_qkv and wide != config):
            loaded = _load(directory, path, tree.map(lambda array: np.empty(array.shape, array.dtype), stored))
            whole = _as_asked(loaded, shape, dtype, quantize, path, str(directory))
            repeat = repeated_kv_rows(config, parts) if is_qkv else np.arange(shape[0])

            def read(
                rows: slice, columns: slice = ALL, *, whole: Parameter = whole, repeat: np.ndarray = repeat
            ) -> Parameter:
                return part_of(whole, repeat[rows], columns)

            yield path, place(read, path, (len(repeat), *shape[1:]), mesh)
            continue

        def described(array: Any, path: str = path) -> jax.ShapeDtypeStruct:
            sharding = NamedSharding(mesh, layout_of_parameter(path, tuple(array.shape), parts).spec)
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

        loaded = _load(directory, path, tree.map(described, stored))
        if is_blocks:
            floats = {
                name: _cast_on_mesh(loaded[name], loaded[name].dtype, path, directory)
                for name in loaded
                if name != "qvalue"
            }
            yield path, BlockWeights(loaded["qvalue"], floats["scale"], floats.get("minimum"), dtype)
        else:
            yield path, _cast_on_mesh(loaded, dtype, path, directory)


def _load(directory: Path, path: str, wanted: Any) -> Any:
    """One parameter; `wanted` describes its arrays."""
    from orbax.checkpoint import v1 as ocp

    described: dict[str, Any] = {}
    _put(described, path, wanted)
    with orbax_context():
        return _get(ocp.load(str((directory / _PARAMS).absolute()), described), path)


def _cast_on_mesh(array: jax.Array, dtype: np.dtype, path: str, directory: Path) -> jax.Array:
    cast = array.astype(dtype)
    if not bool(jnp.isfinite(cast).all()):
        raise CheckpointError(f"{directory}: parameter {path} holds numbers that are not finite in {dtype}")
    return cast


def _as_asked(
    loaded: Any, shape: tuple[int, ...], dtype: np.dtype, quantize: Quantize, path: str, file: str
) -> Parameter:
    """A parameter as it was stored, in the dtype and the bits that are asked for."""
    if isinstance(loaded, Mapping):
        aligned = {name: aligned_empty(array.shape, array.dtype) for name, array in loaded.items()}
        for name, array in loaded.items():
            if name == "qvalue":
                aligned[name][...] = array
            else:
                cast_into(aligned[name], array, f"{path}/{name}", file)
        blocks = BlockWeights(aligned["qvalue"], aligned["scale"], aligned.get("minimum"), dtype)
        if quantize != "none":
            return blocks
        loaded = dataclasses.replace(blocks, dtype=np.dtype("float32")).to_floats()
    result = aligned_empty(shape, dtype)
    cast_into(result, np.asarray(loaded), path, file)
    return quantise(result, dtype, quantize)


def _check_stored(directory: Path, found: Any, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> None:
    for path, shape in shapes.items():
        array = _get(found, path)
        if array is None:
            raise CheckpointError(f"{directory}: parameter {path} of shape {shape} is missing")
        if isinstance(array, Mapping):
            _check_blocks(directory, array, path, shape)
        elif tuple(array.shape) != shape or array.dtype != dtype:  # Orbax would cast without a warning
            raise CheckpointError(
                f"{directory}: parameter {path} is {array.dtype} {tuple(array.shape)}; model.json says {dtype} {shape}"
            )


def _check_blocks(directory: Path, arrays: Mapping[str, Any], path: str, shape: tuple[int, ...]) -> None:
    """Raises CheckpointError unless these are the arrays of weights in few bits of this shape."""
    found = {name: (str(array.dtype), tuple(array.shape)) for name, array in arrays.items()}
    out, D = (*shape, 1)[:2]
    blocks = ("float16", (out, D // BLOCK))
    known = [{"qvalue": ("int8", (out, D)), "scale": ("float32", (out, 1))}]
    for codes in (("int8", (out, D)), ("uint8", (out, D // 2))):
        known += [{"qvalue": codes, "scale": blocks}, {"qvalue": codes, "scale": blocks, "minimum": blocks}]
    if found not in known:
        raise CheckpointError(f"{directory}: parameter {path} is {found}; that is no matrix {shape} in few bits")


def _groups(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Splits the parameters, the largest first, into groups of at most 1 / `_GROUPS` of the model, or of one."""
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    limit = sum(sizes.values()) / _GROUPS
    group: list[str] = []
    for path in sorted(shapes, key=lambda path: -sizes[path]):
        if group and sum(sizes[member] for member in group) + sizes[path] > limit:
            yield group
            group = []
        group.append(path)
    yield group


def orbax_context() -> "ocp.Context":
    """Orbax's settings for our files: written without compression, and read in part if only a part is asked for."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_compression = False
    context.pytree.loading.partial_load = True
    return context


def _parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {
        path: (sum(shape[0] for shape in parts.values()), *next(iter(parts.values()))[1:])
        for path, parts in tensor_layout(config).items()
    }


def _check_arrays(info: CheckpointInfo, params: Mapping[str, Any]) -> None:
    for path, shape in _parameter_shapes(info.config).items():
        array = _get(params, path)
        if array is None:
            raise ValueError(f"parameter {path} of shape {shape} is missing")
        if tuple(array.shape) != shape or array.dtype != dtype_of(info.dtype):
            raise ValueError(
                f"parameter {path} is {array.dtype} {tuple(array.shape)}; the model says {info.dtype} {shape}"
            )
        if isinstance(array, BlockWeights) and array.has_channel_scales and array.scale.shape[1] > 1:
            raise ValueError(
                f"parameter {path} has a scale for each device's part of a row, which no other mesh could read: "
                "load the model without a mesh to save it"
            )


def _get(params: Mapping[str, Any], path: str) -> Any:
    node: Any = params
    for part in path.split("/"):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _put(params: dict[str, Any], path: str, value: Any) -> None:
    *branches, leaf = path.split("/")
    for branch in branches:
        params = params.setdefault(branch, {})
    params[leaf] = value
