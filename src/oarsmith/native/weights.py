"""Weights of a decoder on their way into an arena."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.native.arena import Arena, Plan
from oarsmith.native.bindings import bindings
from oarsmith.native.program import FORMATS, Matrix, Vector

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
        self._vectors: list[tuple[Vector, Tensor]] = []

    def matrix(self, weight: Tensor | Callable[[], Tensor], format: str, rows: Tensor | None = None) -> Matrix:
        """A place for W [O, I]. ``rows``: packed row r is row ``rows[r]`` of it, or one of zeros where that is -1.

        A weight that has to be made first is given as a function, and made when its turn comes.
        """
        make = weight if callable(weight) else lambda: weight
        shape = (weight if isinstance(weight, Tensor) else weight()).shape
        count = shape[0] if rows is None else len(rows)
        block = self._library.native_block_bytes(FORMATS.index(format), shape[1])
        matrix = Matrix(format, count, shape[1], self._plan.take(-(-count // 32) * 2 * block))
        self._matrices.append(_Packing(matrix, make, None if rows is None else rows.to(torch.int64).contiguous()))
        return matrix

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
            self._pack(packing, arena)
        for vector, values in self._vectors:
            target = torch.frombuffer(arena.memory, dtype=torch.float32, count=vector.size, offset=vector.offset)
            target.copy_(values.detach().float().flatten())
        return arena

    def _pack(self, packing: _Packing, arena: Arena) -> None:
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
            arena.address + matrix.offset,
            self._threads,
        )
