"""Weights of a decoder on their way into an arena."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.native.arena import Arena, Plan
from oarsmith.native.bindings import bindings
from oarsmith.native.program import FORMATS, Matrix, Vector
from oarsmith.native.stored import Coded

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class _Packing:
    matrix: Matrix
    weight: Callable[[], Tensor]
    rows: Tensor | None


class Weights:
    """Gives every weight a place at once, and packs them all at the end: the arena's size is known only then."""

    def __init__(self, threads: int) -> None:
        self._library = bindings()
        self._threads = threads
        self._plan = Plan()
        self._matrices: list[_Packing] = []
        # What was packed at once, so that nothing need be kept of what it was packed from.
        self._ready: list[tuple[Matrix, Arena]] = []
        self._vectors: list[tuple[Vector, Tensor]] = []

    def matrix(self, weight: Tensor | Callable[[], Tensor], format: str, rows: Tensor | None = None) -> Matrix:
        """A place for W [O, I]. ``rows``: packed row r is row ``rows[r]`` of it, or one of zeros where that is -1.

        A weight that has to be made first is given as a function, and made when its turn comes.
        """
        make = weight if callable(weight) else lambda: weight
        shape = (weight if isinstance(weight, Tensor) else weight()).shape
        matrix, _ = self._place(format, shape[0] if rows is None else len(rows), shape[1])
        self._matrices.append(_Packing(matrix, make, _indices(rows)))
        return matrix

    def packed(self, weight: Tensor, format: str, rows: Tensor | None = None) -> Matrix:
        """The same, packed at once."""
        matrix, size = self._place(format, len(weight) if rows is None else len(rows), weight.shape[1])
        own = Arena(size)
        self._pack(_Packing(matrix, lambda: weight, _indices(rows)), own.address)
        self._ready.append((matrix, own))
        return matrix

    def coded(self, weight: Coded, rows: Tensor | None = None) -> Matrix:
        """The same for a weight in codes."""
        height, columns = weight.codes_OI.shape
        matrix, size = self._place(weight.format, height if rows is None else len(rows), columns)
        own, index = Arena(size), _indices(rows)
        self._library.native_pack_codes(
            FORMATS.index(weight.format),
            weight.codes_OI.data_ptr(),
            weight.scale_OG.data_ptr(),
            None if weight.low_OG is None else weight.low_OG.data_ptr(),
            None if index is None else index.data_ptr(),
            matrix.rows,
            columns,
            weight.group,
            own.address,
            self._threads,
        )
        self._ready.append((matrix, own))
        return matrix

    def _place(self, format: str, rows: int, columns: int) -> tuple[Matrix, int]:
        size = -(-rows // 32) * 2 * int(self._library.native_block_bytes(FORMATS.index(format), columns))
        return Matrix(format, rows, columns, self._plan.take(size)), size

    def vector(self, values: Tensor) -> Vector:
        """A place for numbers in fp32."""
        vector = Vector(self._plan.take(4 * values.numel()), values.numel())
        self._vectors.append((vector, values))
        return vector

    def rows(self, values: Tensor, rows: Tensor | None = None) -> Vector:
        """A vector beside a matrix's rows: in their order, with zeros up to a whole pair of blocks."""
        values = values.detach().float()
        if rows is not None:
            values = torch.where(rows >= 0, values[rows.clamp_min(0)], 0.0)
        return self.vector(functional.pad(values, (0, -len(values) % 32)))

    @torch.no_grad()
    def pack(self) -> Arena:
        """An arena with all of them."""
        arena = Arena(self._plan.size)
        for packing in self._matrices:
            self._pack(packing, arena.address + packing.matrix.offset)
        while self._ready:
            matrix, own = self._ready.pop()
            ctypes.memmove(arena.address + matrix.offset, own.address, own.size)
        for vector, values in self._vectors:
            target = torch.frombuffer(arena.memory, dtype=torch.float32, count=vector.size, offset=vector.offset)
            target.copy_(values.detach().float().flatten())
        return arena

    def _pack(self, packing: _Packing, address: int) -> None:
        weight, matrix, rows = packing.weight().detach().to("cpu").contiguous(), packing.matrix, packing.rows
        if weight.dtype not in _TYPES:
            weight = weight.float()
        self._library.native_pack(
            FORMATS.index(matrix.format),
            _TYPES[weight.dtype],
            weight.data_ptr(),
            None if rows is None else rows.data_ptr(),
            matrix.rows,
            matrix.columns,
            weight.stride(0),
            address,
            self._threads,
        )


def _indices(rows: Tensor | None) -> Tensor | None:
    return None if rows is None else rows.to(torch.int64).contiguous()
