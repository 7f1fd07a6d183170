"""Matrices packed and multiplied by the compiled library of a level of instructions."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

FORMATS = {"f32": 0, "bf16": 1, "int8": 2, "int4": 3}
SOURCES = {"f32": 0, "bf16": 1, "f16": 2}


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Bits, nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True)
class Packed:
    """A matrix in blocks."""

    library: ctypes.CDLL
    format: str
    rows: int
    columns: int
    blocks: np.ndarray

    def row(self, row: int) -> np.ndarray:
        out = np.full(self.columns, np.nan, np.float32)
        self.library.native_unpack_row(
            FORMATS[self.format],
            pointer(self.blocks),
            ctypes.c_int64(self.rows),
            ctypes.c_int64(self.columns),
            ctypes.c_int64(row),
            pointer(out),
        )
        return out

    def unpacked(self) -> np.ndarray:
        return np.stack([self.row(row) for row in range(self.rows)])

    def multiply(self, x: np.ndarray, threads: int = 1) -> np.ndarray:
        """x W^T in fp32."""
        x = np.ascontiguousarray(x, np.float32)
        y = np.full((x.shape[0], self.rows), 7777.0, np.float32)
        self.library.native_multiply(
            FORMATS[self.format],
            pointer(self.blocks),
            ctypes.c_int64(self.rows),
            ctypes.c_int64(self.columns),
            pointer(x),
            ctypes.c_int64(x.shape[0]),
            pointer(y),
            threads,
        )
        return y


@dataclass(frozen=True)
class Packer:
    """Packs with the library of one level."""

    level: str
    library: ctypes.CDLL

    def pack(
        self, weights: np.ndarray, format: str, *, source: str = "f32", index: list[int] | None = None, threads: int = 1
    ) -> Packed:
        """weights: [rows, columns], in the numbers that `source` says (bf16 as bits); index as `native_pack` has it."""
        rows, columns = weights.shape[0] if index is None else len(index), weights.shape[1]
        which = None if index is None else np.array(index, np.int64)
        self.library.native_block_bytes.restype = ctypes.c_int64
        size = self.library.native_block_bytes(FORMATS[format], ctypes.c_int64(columns)) * 2 * -(-rows // 32)
        memory = np.full(size + 64, 0x55, np.uint8)  # what was there before must not matter
        start = -memory.ctypes.data % 64
        blocks = memory[start : start + size]
        self.library.native_pack(
            FORMATS[format],
            SOURCES[source],
            pointer(weights),
            None if which is None else pointer(which),
            ctypes.c_int64(rows),
            ctypes.c_int64(columns),
            ctypes.c_int64(weights.strides[0] // weights.itemsize),
            pointer(blocks),
            threads,
        )
        return Packed(self.library, format, rows, columns, blocks)
