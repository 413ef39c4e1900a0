"""A reader of GGUF files: the metadata, and the place of each tensor. Every length is checked before it is used.

The reader of the `gguf` package trusts the lengths in a file, so one flipped bit can send it through 2^60 entries of an
array. It also takes seconds for a vocabulary. This reader compares every length with the rest of the file. The tensors
must fill the file without gaps, so a file that was cut short or has grown is an error.

A large model may be split into parts, as llama.cpp's gguf-split writes them: NAME-00001-of-00003.gguf and so on. The
first part has the metadata, and the tensors lie in all of them.

The format is the GGUF specification in the ggml repository, versions 2 and 3, little-endian.
"""

import dataclasses
import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from hshare_jax.errors import CheckpointError
from hshare_jax.files.checksums import verify_checksums

if TYPE_CHECKING:
    from gguf.constants import GGMLQuantizationType

# The gguf package is imported by the functions that need it, because most starts of the program read no GGUF file.

_SCALARS = {  # NumPy dtypes by the names of gguf's GGUFValueType
    "UINT8": "u1", "INT8": "i1", "UINT16": "<u2", "INT16": "<i2", "UINT32": "<u4", "INT32": "<i4", "UINT64": "<u8",
    "INT64": "<i8", "FLOAT32": "<f4", "FLOAT64": "<f8", "BOOL": "?",
}  # fmt: skip
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_PART = re.compile(r"(?P<name>.+)-\d{5}-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a GGUF file."""

    path: str  # of the file
    shape: tuple[int, ...]  # as NumPy writes it, rows first
    kind: "GGMLQuantizationType"
    offset: int  # of the tensor's first byte in the file
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """The metadata and the tensor table of a GGUF file, or of all parts of one. Arrays in the metadata are lists."""

    path: str  # of the file, or of its first part
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]


def gguf_name(path: Path) -> str:
    """The name of the model in a GGUF file: the name of the file, without the number of a part."""
    match = _PART.fullmatch(path.name)
    return match["name"] if match else path.stem


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Reads the metadata and the tensor table of the GGUF file at `path`. No tensor is read.

    If the file is one part of a model, all parts are read. They lie beside it.

    Raises:
        FileNotFoundError: a part is missing.
        CheckpointError: the file is not GGUF, its version or a type is not known, a length does not fit the file, the
            tensors do not fill the file exactly, a checksum beside the file is another, or the parts do not belong
            together.
    """
    path = Path(path)
    file = _read_file(path)
    count = file.metadata.get("split.count", 1)
    if not isinstance(count, int):
        raise CheckpointError(f"{path}: metadata split.count is {count!r}; it must be a whole number")
    if count in (0, 1):
        return file
    match = _PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts of a model, so its name must end in -00001-of-{count:05}.gguf, or in the "
            "number of another part; give the parts the names that they were published with"
        )
    paths = [path.with_name(f"{match['name']}-{part:05}-of-{count:05}{path.suffix}") for part in range(1, count + 1)]
    if lost := [part for part in paths if not part.is_file()]:
        raise FileNotFoundError(f"{lost[0]} is missing: {path} is one of {count} parts, which must lie together")
    return _join([file if part == path else _read_file(part) for part in paths])


def _join(parts: list[GGUFFile]) -> GGUFFile:
    """The file whose parts these are. Raises CheckpointError if they do not belong together."""
    tensors: dict[str, GGUFTensor] = {}
    for number, part in enumerate(parts):
        found, wanted = (part.metadata.get("split.no"), part.metadata.get("split.count")), (number, len(parts))
        if found != wanted:
            raise CheckpointError(
                f"{part.path} says that split.no={found[0]} and split.count={found[1]}; its name says {wanted}"
            )
        if twice := tensors.keys() & part.tensors.keys():
            name = min(twice)
            raise CheckpointError(f"{part.path}: tensor {name!r} is also in {tensors[name].path}")
        tensors |= part.tensors
    total = parts[0].metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise CheckpointError(
            f"{parts[0].path} and the other parts have {len(tensors)} tensors; split.tensors.count={total}"
        )
    return GGUFFile(parts[0].path, parts[0].metadata, tensors)


def _read_file(path: Path) -> GGUFFile:
    from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC

    verify_checksums(path.parent, [path.name])
    with open(path, "rb") as file:
        cursor = _Cursor(file, str(path))
        if cursor.integer("<I") != GGUF_MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
        version = cursor.integer("<I")
        if version not in _VERSIONS:
            raise CheckpointError(
                f"{path} is GGUF version {version}; versions {_VERSIONS} in little-endian order are read"
            )
        num_tensors, num_entries = cursor.integer("<Q"), cursor.integer("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = cursor.text()
            if key in metadata:
                raise cursor.error(f"metadata {key!r} appears twice")
            metadata[key] = cursor.value()
        tensors: dict[str, GGUFTensor] = {}
        for _ in range(num_tensors):
            name = cursor.text()
            if name in tensors:
                raise cursor.error(f"tensor {name!r} appears twice")
            tensors[name] = cursor.tensor(name)
        alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise cursor.error(f"general.alignment={alignment!r} must be a power of two")
        return GGUFFile(cursor.path, metadata, _place(cursor, tensors, alignment))


def _place(cursor: "_Cursor", entries: Mapping[str, GGUFTensor], alignment: int) -> dict[str, GGUFTensor]:
    """Turns offsets into the tensor data into offsets into the file, and checks that the tensors fill the file.

    Each tensor must begin where the tensor before it ends, rounded up to the alignment.
    """
    data_start = _round_up(cursor.position, alignment)
    end = data_start
    tensors = {}
    for name, entry in entries.items():
        start = data_start + entry.offset
        if start != _round_up(end, alignment):
            raise cursor.error(f"tensor {name!r} lies at {entry.offset}, not right behind the tensor before it")
        end = start + entry.num_bytes
        if end > cursor.size:
            raise cursor.error(f"tensor {name!r} ends at byte {end}, but the file has {cursor.size}: it is cut short")
        tensors[name] = dataclasses.replace(entry, offset=start)
    if cursor.size > _round_up(end, alignment):
        raise cursor.error(f"the tensors end at byte {end}, but the file goes on to {cursor.size}")
    return tensors


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class _Cursor:
    """Reads a file from its start and never past its end."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.path, self.size, self.position = path, os.fstat(file.fileno()).st_size, 0
        self._file = file

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {what}")

    def take(self, length: int) -> bytes:
        """The next `length` bytes."""
        if length > self.size - self.position:
            raise self.error(f"{length} bytes are announced at byte {self.position} of {self.size}")
        self.position += length
        return self._file.read(length)

    def integer(self, layout: str) -> int:
        """The next integer, in a layout of `struct`."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def text(self) -> str:
        """The next text: its length, then UTF-8."""
        data = self.take(self.integer("<Q"))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"a text before byte {self.position} is not UTF-8") from error

    def value(self) -> Any:
        """The next metadata value: its type, then a scalar, a text or a list."""
        kind = self._value_kind()
        if kind == "STRING":
            return self.text()
        if kind == "ARRAY":
            kind, length = self._value_kind(), self.integer("<Q")
            return [self.text() for _ in range(length)] if kind == "STRING" else self._scalars(kind, length)
        return self._scalars(kind, 1)[0]

    def _value_kind(self) -> str:
        from gguf.constants import GGUFValueType

        number = self.integer("<I")
        try:
            return GGUFValueType(number).name
        except ValueError as error:
            raise self.error(f"a metadata value before byte {self.position} has the unknown type {number}") from error

    def _scalars(self, kind: str, count: int) -> list[Any]:
        if kind not in _SCALARS:
            raise self.error(f"a metadata list before byte {self.position} holds values of type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()

    def tensor(self, name: str) -> GGUFTensor:
        """The next entry of the tensor table, its offset counted from the start of the tensor data."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        num_dimensions = self.integer("<I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise self.error(f"tensor {name!r} has {num_dimensions} dimensions; 1 to {_MAX_DIMENSIONS} are possible")
        shape = tuple(reversed([self.integer("<Q") for _ in range(num_dimensions)]))
        raw_kind, offset = self.integer("<I"), self.integer("<Q")
        try:
            kind = GGMLQuantizationType(raw_kind)
        except ValueError as error:
            raise self.error(f"tensor {name!r} has the unknown type {raw_kind}") from error
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block_size:
            raise self.error(f"tensor {name!r}: rows of {shape[-1]} are not whole blocks of {kind.name}")
        return GGUFTensor(self.path, shape, kind, offset, math.prod(shape) // block_size * block_bytes)
