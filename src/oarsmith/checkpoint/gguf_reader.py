"""A bounds-checked GGUF reader: header and metadata here, block formats from the `gguf` package.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package's own reader slices a memory map without
looking at its end, so a cut or hostile file gives an IndexError or a loop of 2**64 steps; it also takes 3 s for a
vocabulary of 49k (this one: 0.1 s).
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGUF_VERSION, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from oarsmith.errors import CheckpointError

_MAGIC = b"GGUF"
_MAX_DIMS = 4
_MAX_NESTING = 4
_CHUNK_ELEMENTS = 1 << 22  # 16 MiB of float32: the working set of a dequantization, whatever the tensor's size
_REFETCH = "copy or download the file again"
_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "|b1",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies. `shape` is in row-major order (GGUF stores it reversed)."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    num_bytes: int


class _Cursor:
    """Reads forward through the header; every read is checked against the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.offset = 0

    def take(self, num_bytes: int, what: str) -> bytes:
        self.require(num_bytes, what)
        start = self.offset
        self.offset += num_bytes
        return self.data[start : self.offset]

    def require(self, num_bytes: int, what: str) -> None:
        if self.offset + num_bytes > len(self.data):
            raise CheckpointError(
                f"the file is truncated or damaged: {what} needs at least {self.offset + num_bytes:,} bytes, "
                f"the file has {len(self.data):,}",
                where=str(self.path),
                fix=_REFETCH,
            )

    def u32(self, what: str) -> int:
        return int(struct.unpack("<I", self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(struct.unpack("<Q", self.take(8, what))[0])

    def string(self, what: str) -> str:
        raw = self.take(self.u64(what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{what} is not UTF-8", where=str(self.path), fix=_REFETCH) from error

    def value_type(self, what: str) -> GGUFValueType:
        number = self.u32(what)
        if number not in GGUFValueType.__members__.values():
            raise CheckpointError(f"{what} has the unknown value type {number}", where=str(self.path), fix=_REFETCH)
        return GGUFValueType(number)

    def value(self, kind: GGUFValueType, what: str, depth: int = 0) -> Any:
        if kind is GGUFValueType.STRING:
            return self.string(what)
        if kind is GGUFValueType.ARRAY:
            return self._array(what, depth)
        number = self._numbers(kind, 1, what)[0]
        # 1e-05 is stored as float32 and would come out as 9.99999974e-06: the shortest decimal names the same float32.
        return float(str(number)) if kind is GGUFValueType.FLOAT32 else number.item()

    def _numbers(self, kind: GGUFValueType, count: int, what: str) -> np.ndarray:
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize, what), dtype=dtype)

    def _array(self, what: str, depth: int) -> list[Any]:
        kind = self.value_type(what)
        count = self.u64(what)
        if depth >= _MAX_NESTING:
            raise CheckpointError(f"{what} nests arrays deeper than {_MAX_NESTING}", where=str(self.path), fix=_REFETCH)
        if kind in _SCALARS:
            return list(self._numbers(kind, count, what).tolist())
        self.require(count * 8, what)  # each item carries at least a length: bounds the loop before it starts
        return [self.value(kind, what, depth + 1) for _ in range(count)]


class GgufFile:
    """A GGUF file whose header, metadata and tensor ranges have been checked.

    Attributes:
        metadata: key -> number, bool, string or list.
        tensors: name -> `GgufTensor`, in file order.
        num_bytes: size of the file.

    Raises:
        CheckpointError: not a GGUF file, a version this reader does not know, big-endian, truncated, one part of a
            split file, or inconsistent; the message names what was expected and what is there.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError("no such file", where=str(path), fix="check the path")
        self.path = path
        self.num_bytes = path.stat().st_size
        if self.num_bytes < 24:
            raise CheckpointError(
                f"a GGUF file has at least 24 bytes, this one {self.num_bytes}", where=str(path), fix=_REFETCH
            )
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        cursor = _Cursor(path, self._data)
        _check_version(cursor)
        num_tensors = cursor.u64("the tensor count")
        num_keys = cursor.u64("the metadata count")
        self.metadata = self._read_metadata(cursor, num_keys)
        self.tensors = self._read_tensors(cursor, num_tensors)
        if self.metadata.get("split.count", 0) > 1:
            raise CheckpointError(
                f"this is one of {self.metadata['split.count']} parts of a split model",
                where=str(path),
                fix="join the parts first: llama-gguf-split --merge FIRST_PART OUT.gguf",
            )

    def _read_metadata(self, cursor: _Cursor, count: int) -> dict[str, Any]:
        cursor.require(count * 13, f"metadata of {count:,} keys")
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = cursor.string("a metadata key")
            if key in metadata:
                raise CheckpointError(f"the metadata key {key!r} occurs twice", where=str(self.path), fix=_REFETCH)
            metadata[key] = cursor.value(cursor.value_type(key), key)
        return metadata

    def _read_tensors(self, cursor: _Cursor, count: int) -> dict[str, GgufTensor]:
        cursor.require(count * 24, f"a list of {count:,} tensors")
        found = [self._read_tensor_info(cursor) for _ in range(count)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise CheckpointError(f"general.alignment {alignment!r} is not a power of two", where=str(self.path))
        data_start = -(-cursor.offset // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        end = data_start
        for tensor in sorted(found, key=lambda item: item.start):
            placed = GgufTensor(tensor.name, tensor.shape, tensor.type, data_start + tensor.start, tensor.num_bytes)
            where = f"{self.path}: {tensor.name}"
            if tensor.name in tensors:
                raise CheckpointError("the tensor occurs twice", where=where, fix=_REFETCH)
            if placed.start < end or tensor.start % alignment:
                raise CheckpointError(
                    "the tensor's data overlaps another's or is not aligned", where=where, fix=_REFETCH
                )
            end = placed.start + placed.num_bytes
            tensors[tensor.name] = placed
        if tensors and end > self.num_bytes:  # a file of metadata alone may end before the alignment
            raise CheckpointError(
                f"the file is truncated: {len(tensors)} tensors need {end:,} bytes, the file has {self.num_bytes:,}",
                where=str(self.path),
                fix=_REFETCH,
            )
        return {tensor.name: tensors[tensor.name] for tensor in found}

    def _read_tensor_info(self, cursor: _Cursor) -> GgufTensor:
        """`start` is still relative to the data section, whose place is known only after the last entry."""
        name = cursor.string("a tensor name")
        where = f"{self.path}: {name}"
        num_dims = cursor.u32(name)
        if not 1 <= num_dims <= _MAX_DIMS:
            raise CheckpointError(f"the tensor has {num_dims} dimensions, 1 to {_MAX_DIMS} are possible", where=where)
        shape = tuple(reversed([cursor.u64(name) for _ in range(num_dims)]))
        number = cursor.u32(name)
        start = cursor.u64(name)
        if number not in GGMLQuantizationType.__members__.values():
            raise CheckpointError(
                f"tensor type {number} is not known to the installed gguf package",
                where=where,
                fix="pip install --upgrade gguf, or quantize the model to a common type such as Q8_0",
            )
        kind = GGMLQuantizationType(number)
        block_elements, block_bytes = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block_elements:
            raise CheckpointError(f"shape {shape} does not fill {kind.name} blocks of {block_elements}", where=where)
        return GgufTensor(name, shape, kind, start, math.prod(shape) // block_elements * block_bytes)

    def raw(self, tensor: GgufTensor) -> np.ndarray:
        """The tensor's bytes as they lie in the file: uint8 [num_bytes], a view of the memory map."""
        return np.frombuffer(self._data, dtype=np.uint8, count=tensor.num_bytes, offset=tensor.start)

    def read(self, tensor: GgufTensor, dtype: torch.dtype, *, index: int | None = None) -> torch.Tensor:
        """Dequantize in float32, cast to `dtype`, in chunks of rows.

        Args:
            index: only this entry of the first dimension (one expert of many).

        Returns:
            A tensor of `tensor.shape`, without its first dimension if `index` is given.

        Raises:
            CheckpointError: a type without a float value (integers), or one the gguf package cannot dequantize; a value
                that is not finite, or does not fit into float16.
        """
        shape = tensor.shape if index is None else tensor.shape[1:]
        num_rows = math.prod(shape[:-1])
        rows = self.raw(tensor).reshape(math.prod(tensor.shape[:-1]), -1)
        if index is not None:
            rows = rows[index * num_rows : (index + 1) * num_rows]
        out = torch.empty(num_rows, shape[-1], dtype=dtype)
        step = max(1, _CHUNK_ELEMENTS // shape[-1])
        for first in range(0, num_rows, step):
            part = out[first : first + step]
            part.copy_(self._dequantize(rows[first : first + step], tensor))
            if dtype is torch.float16 and not torch.isfinite(part).all():
                raise CheckpointError(
                    "a value does not fit into float16",
                    where=f"{self.path}: {tensor.name}",
                    fix="convert to bfloat16 or float32",
                )
        return out.reshape(shape)

    def _dequantize(self, rows: np.ndarray, tensor: GgufTensor) -> torch.Tensor:
        where = f"{self.path}: {tensor.name}"
        try:
            with np.errstate(all="ignore"):  # what comes of damaged scales is checked here
                # np.array: float32 comes back as a view of the read-only map, which torch cannot wrap.
                values = np.array(dequantize(rows, tensor.type), dtype=np.float32)
                finite = math.isfinite(float(values.sum(dtype=np.float64)))
        except NotImplementedError as error:
            raise CheckpointError(
                f"the gguf package cannot dequantize {tensor.type.name}",
                where=where,
                fix="pip install --upgrade gguf, or quantize the model to a common type such as Q8_0",
            ) from error
        if not finite:
            raise CheckpointError("the tensor holds NaN or infinite values", where=where, fix=_REFETCH)
        return torch.from_numpy(values)


def _check_version(cursor: _Cursor) -> None:
    where = str(cursor.path)
    magic = cursor.take(4, "the magic number")
    if magic != _MAGIC:
        raise CheckpointError(f"not a GGUF file: it begins with {magic!r}, not {_MAGIC!r}", where=where)
    version = cursor.u32("the version")
    if version & 0xFFFF == 0:
        raise CheckpointError("the file is big-endian", where=where, fix="convert it: gguf-convert-endian FILE little")
    if version > GGUF_VERSION:
        raise CheckpointError(
            f"GGUF version {version} is newer than {GGUF_VERSION}, the newest this version reads",
            where=where,
            fix="pip install --upgrade oarsmith gguf",
        )
    if version < 2:
        raise CheckpointError(
            f"GGUF version {version} is too old; versions 2 to {GGUF_VERSION} are read",
            where=where,
            fix="convert the model again with a current llama.cpp",
        )
