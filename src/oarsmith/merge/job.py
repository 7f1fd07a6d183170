"""What a method is given: one tensor of every model, in the numbers of the files; and arithmetic block by block.

Weights are read in their own dtype and computed with in float32, a block at a time, so that beside the tensors of the
files there are only blocks that stay in a core's cache. Sums over a tensor are taken in float64.

Shapes: N models, B elements of a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_BLOCK = 1 << 18


@dataclass(frozen=True)
class TensorJob:
    """One tensor to make.

    Attributes:
        name: of the tensor that is written.
        base: the base model's, where the method has a base.
        tensors: the models', in the recipe's order; all of the same shape.
        own: parameters of each model.
        shared: parameters of the merge.
        dtype: of the result.
        seed: of random methods; masks depend on it, on ``name`` and on the model's number alone.
    """

    name: str
    base: Tensor | None
    tensors: tuple[Tensor, ...]
    own: tuple[Mapping[str, Any], ...]
    shared: Mapping[str, Any]
    dtype: torch.dtype
    seed: int = 0

    @property
    def shape(self) -> torch.Size:
        return self.tensors[0].shape if self.tensors else self.needed_base.shape

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def row(self) -> int:
        """Elements of a row: of the last axis."""
        return max(self.shape[-1], 1) if self.shape else 1

    @property
    def needed_base(self) -> Tensor:
        assert self.base is not None, f"{self.name}: the plan gives a base to every method that needs one"
        return self.base

    @property
    def weights(self) -> list[float]:
        return [float(one["weight"]) for one in self.own]

    def values(self, index: int, part: slice) -> Tensor:
        """A block [B] of a model in float32, in memory of its own."""
        return _floats(self.tensors[index], part)

    def base_values(self, part: slice) -> Tensor:
        """The same of the base."""
        return _floats(self.needed_base, part)

    def delta(self, index: int, part: slice) -> Tensor:
        """The same of what a model has added to the base."""
        return self.values(index, part).sub_(_view(self.needed_base, part))

    def key(self, purpose: str, index: int) -> int:
        """A seed for random numbers, one for each (seed, tensor, purpose, model)."""
        text = f"{self.seed}/{self.name}/{purpose}/{index}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _view(tensor: Tensor, part: slice) -> Tensor:
    return tensor.reshape(-1)[part]


def _floats(tensor: Tensor, part: slice) -> Tensor:
    return _view(tensor, part).to(torch.float32, copy=True)


def blocks(numel: int, row: int = 1) -> Iterator[slice]:
    """Runs of elements, of whole rows."""
    step = max(_BLOCK // row, 1) * row
    for start in range(0, numel, step):
        yield slice(start, min(start + step, numel))


def by_block(job: TensorJob, function: Callable[[slice], Tensor], row: int = 1) -> Tensor:
    """The result, whose blocks ``function`` computes in float32, rounded once to the job's dtype."""
    result = torch.empty(job.shape, dtype=job.dtype)
    flat = result.view(-1)
    for part in blocks(job.numel, row):
        flat[part] = function(part)
    return result


def combine(job: TensorJob, factors: Sequence[float], base_factor: float = 0.0) -> Tensor:
    """sum of factor * tensor over the models, plus base_factor * base."""

    def block(part: slice) -> Tensor:
        total = job.base_values(part).mul_(base_factor) if base_factor else None
        for index, factor in enumerate(factors):
            if total is None:
                total = job.values(index, part).mul_(factor)
            elif factor:
                total.add_(job.values(index, part), alpha=factor)
        assert total is not None, job.name
        return total

    return by_block(job, block)


def products(job: TensorJob, *, deltas: bool) -> Tensor:
    """Inner products [N, N] in float64 of the tensors as vectors, or of what they add to the base.

    What lies in the span of a few vectors is known by these: the spherical methods need nothing else.
    """
    count = len(job.tensors)
    total_NN = torch.zeros(count, count, dtype=torch.float64)
    for part in blocks(job.numel):
        rows = [job.delta(i, part) if deltas else job.values(i, part) for i in range(count)]
        x_NB = torch.stack(rows).double()
        total_NN += x_NB @ x_NB.T
    return total_NN
