"""The inside of a GGUF file: its metadata, and where each tensor lies; nothing is believed before it is checked.

The reader of the `gguf` package follows lengths beyond the end of a damaged file, where one flipped bit can send it
through 2^60 array entries, and takes seconds for a vocabulary. Here every length is compared with what is left of the
file before it is used, and the tensors must tile the file without gaps, so that a file cut short or grown is an error.
The format: the GGUF specification in the ggml repository, versions 2 and 3, little-endian.
"""

import dataclasses
import math
import os
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGMLQuantizationType, GGUFValueType

from hshare_jax.errors import CheckpointError

_SCALARS = {
    GGUFValueType.UINT8: "u1", GGUFValueType.INT8: "i1", GGUFValueType.UINT16: "<u2", GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4", GGUFValueType.INT32: "<i4", GGUFValueType.FLOAT32: "<f4", GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8", GGUFValueType.INT64: "<i8", GGUFValueType.FLOAT64: "<f8",
}  # fmt: skip
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """One tensor: its shape as NumPy writes it (rows first), how it is quantised, and its bytes in the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """What a GGUF file says about itself. Arrays in the metadata are lists."""

    path: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Returns the metadata and the tensor table of the GGUF file at `path`; no tensor is read.

    Raises:
        CheckpointError: not a GGUF file, an unknown version or type, a length that does not fit the file, or tensors
        that do not
            fill it exactly.
    """
    with open(path, "rb") as file:
        cursor = _Cursor(file, os.fspath(path))
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
            metadata[key] = cursor.value(cursor.integer("<I"))
        tensors: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
        for _ in range(num_tensors):
            name = cursor.text()
            if name in tensors:
                raise cursor.error(f"tensor {name!r} appears twice")
            tensors[name] = cursor.tensor_entry(name)
        alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise cursor.error(f"general.alignment={alignment!r} must be a power of two")
        return GGUFFile(cursor.path, metadata, _place(cursor, tensors, alignment))


def _place(
    cursor: "_Cursor", entries: Mapping[str, tuple[tuple[int, ...], GGMLQuantizationType, int]], alignment: int
) -> dict[str, GGUFTensor]:
    """Returns the tensors, at offsets into the file; each must begin where the one before it ends, once aligned."""
    data_start = _round_up(cursor.position, alignment)
    end = data_start
    tensors = {}
    for name, (shape, kind, offset) in entries.items():
        if data_start + offset != _round_up(end, alignment):
            raise cursor.error(f"tensor {name!r} lies at {offset}, not right behind the tensor before it")
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
        num_bytes = math.prod(shape) // block_size * block_bytes
        end = data_start + offset + num_bytes
        if end > cursor.size:
            raise cursor.error(f"tensor {name!r} ends at byte {end}, but the file has {cursor.size}: it is cut short")
        tensors[name] = GGUFTensor(shape, kind, data_start + offset, num_bytes)
    if cursor.size > _round_up(end, alignment):
        raise cursor.error(f"the tensors end at byte {end}, but the file goes on to {cursor.size}")
    return tensors


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class _Cursor:
    """Reads a file forwards and never past its end."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.path, self.size, self.position = path, os.fstat(file.fileno()).st_size, 0
        self._file = file

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {what}")

    def take(self, length: int) -> bytes:
        if length > self.size - self.position:
            raise self.error(f"{length} bytes are announced at byte {self.position} of {self.size}")
        self.position += length
        return self._file.read(length)

    def integer(self, layout: str) -> int:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def text(self) -> str:
        data = self.take(self.integer("<Q"))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"a text before byte {self.position} is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind == GGUFValueType.ARRAY:
            kind, length = self.integer("<I"), self.integer("<Q")
            return [self.text() for _ in range(length)] if kind == GGUFValueType.STRING else self._numbers(kind, length)
        return self._numbers(kind, 1)[0]

    def _numbers(self, kind: int, count: int) -> list[Any]:
        layout = _SCALARS.get(kind)  # pyright: ignore[reportArgumentType] - an IntEnum's members equal their numbers
        if layout is None:
            raise self.error(f"a metadata value before byte {self.position} has the unknown type {kind}")
        dtype = np.dtype(layout)
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()

    def tensor_entry(self, name: str) -> tuple[tuple[int, ...], GGMLQuantizationType, int]:
        num_dimensions = self.integer("<I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise self.error(f"tensor {name!r} has {num_dimensions} dimensions; 1 to {_MAX_DIMENSIONS} are possible")
        shape = tuple(reversed([self.integer("<Q") for _ in range(num_dimensions)]))
        raw_kind, offset = self.integer("<I"), self.integer("<Q")
        try:
            kind = GGMLQuantizationType(raw_kind)
        except ValueError as error:
            raise self.error(f"tensor {name!r} has the unknown type {raw_kind}") from error
        if shape[-1] % GGML_QUANT_SIZES[kind][0]:
            raise self.error(f"tensor {name!r}: rows of {shape[-1]} are not whole blocks of {kind.name}")
        return shape, kind, offset
