"""Matrices packed and multiplied by the compiled library of a level of instructions."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import numpy as np

FORMATS = {"f32": 0, "bf16": 1, "int8": 2, "int4": 3, "e4m3": 5}
SOURCES = {"f32": 0, "bf16": 1, "f16": 2}


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Bits, nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True, eq=False)
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


def normal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)


@cache
def packed_normal(packer: Packer, format: str, rows: int, columns: int) -> tuple[Packed, np.ndarray]:
    """A matrix of normal weights, and what its packed weights stand for in fp64."""
    packed = packer.pack(normal(rows, columns), format)
    return packed, packed.unpacked().astype(np.float64)


def groups_of(x: np.ndarray) -> np.ndarray:
    """[rows, groups, 32], with zeros up to 32."""
    return np.pad(x, ((0, 0), (0, -x.shape[1] % 32))).reshape(x.shape[0], -1, 32)


# Of an input, as a part of the largest of its group of 32: half a step of int8, or of bf16. Weights of 8 and 4 bits may
# become bf16 on the way, with an error of at most 0.72 steps.
INPUT_ERROR = {"f32": 2.0**-24, "bf16": 2.0**-8, "int8": 0.5 / 127, "int4": 0.5 / 127, "e4m3": 2.0**-8}
BF16_WEIGHT_ERROR = 0.72 * 2.0**-7


def check_product(packed: Packed, weights: np.ndarray, x: np.ndarray, threads: int = 1) -> None:
    """Against what the packed weights stand for: no output is off by more than the errors of its inputs allow."""
    expected = x.astype(np.float64) @ weights.T
    found = packed.multiply(x, threads)
    largest = np.repeat(np.abs(groups_of(x)).max(2), 32, 1)[:, : x.shape[1]].astype(np.float64)
    # Errors are independent and of either sign: their sum grows as the root of their squares. 5 of these at most.
    size = np.sqrt((largest**2) @ (weights**2).T)
    error = INPUT_ERROR[packed.format] + (0.0 if packed.format == "f32" else BF16_WEIGHT_ERROR)
    excess = np.abs(found - expected) / (5 * size * (error + 2.0**-20) + 1e-30)
    assert (excess <= 1).all(), float(excess.max())
