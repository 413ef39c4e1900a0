"""Our own checkpoint: a directory with the parameters (by Orbax), the configuration, the tokeniser and checksums.

    model.json      configuration, dtype, ids that end a generation, name
    params/         Orbax, uncompressed: random mantissas do not compress, and this loads faster
    tokenizer/      as transformers saves it, chat template included; absent for a model without one
    SHA256SUMS      of all the files above

It is written beside its final name, flushed to the disk and renamed, so nothing half-written ever stands under that
name. On loading, every file is compared with its checksum before Orbax sees any: Orbax casts a wrong dtype in silence
and finds no flipped bits.
"""

import dataclasses
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jax import tree
from orbax.checkpoint import v1 as ocp
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hshare_jax.errors import CheckpointError
from hshare_jax.files.checksums import verify_all, write_checksums
from hshare_jax.models.config import ModelConfig, RopeConfig
from hshare_jax.models.weights import DType, aligned_empty, cast_into, dtype_of, tensor_layout

_MODEL, _PARAMS, _TOKENIZER = "model.json", "params", "tokenizer"
_FORMAT = 1
# A call of Orbax takes some 20 ms; what fewer and larger ones free is slow to return to the system.
_GROUPS = 24


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What model.json says: everything of a checkpoint but its arrays and its tokeniser."""

    config: ModelConfig
    dtype: DType
    eos_token_ids: tuple[int, ...]
    name: str


def is_orbax_directory(directory: Path) -> bool:
    """Returns whether `directory` looks like one of our checkpoints."""
    return (directory / _MODEL).is_file()


def save_checkpoint(
    path: str | os.PathLike[str],
    info: CheckpointInfo,
    params: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint directory at `path`, all of it or none.

    Raises:
        FileExistsError: `path` exists and `overwrite` is False. Overwriting replaces only a directory that is one of
        our checkpoints. ValueError: the parameters are not those of `info.config` in `info.dtype`.
    """
    path = Path(path).expanduser().absolute()  # Orbax asks for absolute paths
    if path.exists() and not (overwrite and is_orbax_directory(path)):
        way_out = (
            "it is not a checkpoint of this library" if overwrite else "choose another path, or ask to overwrite it"
        )
        raise FileExistsError(f"{path} exists; {way_out}")
    _check_arrays(info, params)
    with whole_directory(path, overwrite=overwrite) as draft:
        write_arrays(draft / _PARAMS, tree.map(np.asarray, params))
        if tokenizer is not None:
            tokenizer.save_pretrained(draft / _TOKENIZER)
        (draft / _MODEL).write_text(json.dumps({"format": _FORMAT, **dataclasses.asdict(info)}, indent=1) + "\n")


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes a tree of NumPy arrays by Orbax; OSError, which names the path, where the system refuses to write."""
    try:
        with orbax_context():
            ocp.save(str(path), arrays)
    except ValueError as error:  # what the system said to tensorstore is in the text alone
        if (code := re.search(r"os_error_code='(\d+)'", str(error))) is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


@contextmanager
def whole_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty directory to fill; then it gets its checksums, is flushed, and becomes `path`: all of it or none.

    One that is left behind by a kill is called `.<name of path>.` and some letters, and lies beside `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # In the same directory, because only there is a rename one indivisible step.
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True) as here:
            draft = Path(here) / "checkpoint"
            draft.mkdir()
            yield draft
            write_checksums(draft)
            _flush(draft)
            replaced = Path(here) / "replaced"
            try:
                if overwrite and path.exists():
                    path.rename(replaced)
                draft.rename(path)
            except BaseException:  # an interrupt too
                if replaced.exists() and not path.exists():
                    replaced.rename(path)
                raise
            _flush_directory(path.parent)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # a full disk does not say of itself where it is
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def read_checkpoint_info(directory: Path) -> CheckpointInfo:
    """Returns the checkpoint's description; CheckpointError if any file differs from its checksum."""
    verify_all(directory)
    path = directory / _MODEL
    try:
        found = json.loads(path.read_bytes())
        if found.pop("format") != _FORMAT:
            raise CheckpointError(
                f"{path} has another format than {_FORMAT}; write the checkpoint anew with this version"
            )
        rope = found["config"].pop("rope")
        rope["divisors"] = rope["divisors"] and tuple(rope["divisors"])
        fields = found.pop("config")
        for name in ("windows", "kv_layer_map"):
            fields[name] = fields.get(name) and tuple(fields[name])  # JSON has no tuples
        config = ModelConfig(**fields, rope=RopeConfig(**rope))
        dtype_of(found["dtype"])
        return CheckpointInfo(config=config, eos_token_ids=tuple(found.pop("eos_token_ids")), **found)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} does not describe a model: {error}") from error


def read_checkpoint_tokenizer(directory: Path) -> PreTrainedTokenizerBase | None:
    """Returns the checkpoint's tokeniser, or None where it has none."""
    path = directory / _TOKENIZER
    # Every tokeniser that is saved has a tokenizer.json; AutoTokenizer would import torch where that is installed.
    return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True) if path.is_dir() else None


def stream_checkpoint(directory: Path, info: CheckpointInfo, dtype: DType) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (parameter path, its array in `dtype` on the host), reading it in about `_GROUPS` parts.

    Raises:
        CheckpointError: a parameter is missing, or has another shape or dtype than model.json says.
    """
    shapes = _parameter_shapes(info.config)
    stored, target = dtype_of(info.dtype), dtype_of(dtype)
    where = str((directory / _PARAMS).absolute())
    _check_stored(directory, ocp.metadata(where).metadata, shapes, stored)
    for paths in _groups(shapes):
        wanted: dict[str, Any] = {}
        for path in paths:
            _put(wanted, path, np.empty(shapes[path], stored))  # only its shape and dtype are used
        with orbax_context():
            loaded = ocp.load(where, wanted)
        for path in paths:
            result = aligned_empty(shapes[path], target)
            cast_into(result, _get(loaded, path), path, str(directory))
            yield path, result


def _check_stored(directory: Path, found: Any, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> None:
    for path, shape in shapes.items():
        array = _get(found, path)
        if array is None:
            raise CheckpointError(f"{directory}: parameter {path} of shape {shape} is missing")
        if tuple(array.shape) != shape or array.dtype != dtype:  # Orbax would cast without a word
            raise CheckpointError(
                f"{directory}: parameter {path} is {array.dtype} {tuple(array.shape)}; model.json says {dtype} {shape}"
            )


def _groups(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Yields the parameters, the largest first, in lists of one or of at most 1 / `_GROUPS` of the model."""
    sizes = {path: math.prod(shape) for path, shape in shapes.items()}
    limit = sum(sizes.values()) / _GROUPS
    group: list[str] = []
    for path in sorted(shapes, key=lambda path: -sizes[path]):
        if group and sum(sizes[member] for member in group) + sizes[path] > limit:
            yield group
            group = []
        group.append(path)
    yield group


def orbax_context() -> ocp.Context:
    """Returns how we write and read: uncompressed, and only the arrays that are asked for."""
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


def _flush(directory: Path) -> None:
    """Has the system write everything below `directory` to the disk."""
    for folder, _, names in os.walk(directory):
        for name in names:
            with open(Path(folder) / name, "rb+") as file:
                os.fsync(file.fileno())
        _flush_directory(Path(folder))


def _flush_directory(directory: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):  # Windows cannot open directories
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
