"""Forward through the header of a GGUF file: numbers, strings and arrays, each checked against the end of the file."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGUF_VERSION, GGUFValueType

from oarsmith.checkpoint.files import REFETCH
from oarsmith.errors import CheckpointError

_MAGIC = b"GGUF"
_MAX_NESTING = 4
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


class Cursor:
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
                fix=REFETCH,
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
            raise CheckpointError(f"{what} is not UTF-8", where=str(self.path), fix=REFETCH) from error

    def value_type(self, what: str) -> GGUFValueType:
        number = self.u32(what)
        if number not in GGUFValueType.__members__.values():
            raise CheckpointError(f"{what} has the unknown value type {number}", where=str(self.path), fix=REFETCH)
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
            raise CheckpointError(f"{what} nests arrays deeper than {_MAX_NESTING}", where=str(self.path), fix=REFETCH)
        if kind in _SCALARS:
            return list(self._numbers(kind, count, what).tolist())
        self.require(count * 8, what)  # each item carries at least a length: bounds the loop before it starts
        return [self.value(kind, what, depth + 1) for _ in range(count)]


def check_version(cursor: Cursor) -> None:
    """Magic number and version, the first eight bytes."""
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
