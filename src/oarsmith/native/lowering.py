"""What the lowering of every part needs: buffers, weights, and the list of operations so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn

from oarsmith.models.linear import Linear
from oarsmith.models.norm import LayerNorm, RMSNorm
from oarsmith.models.spec import DecoderSpec
from oarsmith.models.spec_parts import Activation, ClampedSwiGLU
from oarsmith.native.program import Into, Matrix, Norm, Operation, Rotation, Vector
from oarsmith.native.stored import WeightFiles, coded
from oarsmith.native.weights import Weights

NormModule = RMSNorm | LayerNorm


class Bend(TypedDict, total=False):
    """The fields of an operation that say what happens to a number after a product."""

    activation: str
    alpha: float
    limit: float


@dataclass(frozen=True)
class Source:
    """Where a part reads: a buffer, through a norm or not."""

    buffer: int
    norm: Norm | None = None


@dataclass(frozen=True)
class Target:
    """Where a part adds its result y: buffer = keep * buffer + scale * y."""

    buffer: int
    keep: float = 1.0
    scale: float = 1.0


class Lowering:
    """A program in the making.

    Args:
        format: of the weights of the layers, and ``head_format`` of the output matrix and the embedding, unless a
            checkpoint holds them as codes.
        files: where weights on the meta device are read.

    Attributes:
        codes: how many weights of the files' codes were packed as such, by format.
        decoded: why others became floats, and how many.
    """

    def __init__(
        self, spec: DecoderSpec, format: str, head_format: str, threads: int, files: WeightFiles | None = None
    ) -> None:
        self.spec = spec
        self.format = format
        self.head_format = head_format
        self.weights = Weights(threads)
        self.codes: Counter[str] = Counter()
        self.decoded: Counter[str] = Counter()
        self._files = files
        self.ops: list[Operation] = []
        self.widths: list[int] = []
        self.rotations: list[Rotation] = []
        self.states: list[int] = []
        # By position rule: layers share them.
        self.rotation_of: dict[object, int] = {}
        self.bias_of: dict[object, Vector] = {}
        self._buffers: dict[tuple[str, int], int] = {}
        self.stream = self.buffer("stream", spec.hidden_size)

    def buffer(self, role: str, width: int) -> int:
        """The buffer of this role and width: parts of the same kind share it."""
        key = role, width
        if key not in self._buffers:
            self._buffers[key] = len(self.widths)
            self.widths.append(width)
        return self._buffers[key]

    def floats(self, weight: nn.Parameter) -> Tensor:
        """A weight, read if it has not been."""
        if not weight.is_meta:
            return weight
        assert self._files is not None, "a weight without memory, and no files to read it from"
        return self._files.floats(weight)

    def matrices(
        self,
        weight: nn.Parameter,
        format: str,
        rows: Tensor | None = None,
        change: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Matrix, ...]:
        """Places for a weight, or for each of stacked ones, in this format or in that of its file's codes.

        Args:
            rows: see `Weights.matrix`.
            change: what is packed in its place, made of its floats.
        """
        change = change or _unchanged
        if not weight.is_meta:
            every = weight.unbind() if weight.dim() == 3 else (weight,)
            return tuple(self.weights.matrix(change(one), format, rows) for one in every)
        assert self._files is not None, "a weight without memory, and no files to read it from"
        codes = self._files.codes(weight)
        if codes is not None:
            found = ["heads that are padded" if change is not _unchanged else coded(parts) for parts in codes]
            if not any(isinstance(one, str) for one in found):
                self.codes.update(one.format for one in found if not isinstance(one, str))
                return tuple(self.weights.coded(one, rows) for one in found if not isinstance(one, str))
            self.decoded.update(one for one in found if isinstance(one, str))
        floats = self.floats(weight)
        every = floats.unbind() if floats.dim() == 3 else (floats,)
        return tuple(self.weights.packed(change(one), format, rows) for one in every)

    def linear(
        self,
        source: Source,
        module: Linear,
        target: int,
        *,
        into: Into = "store",
        rows: Tensor | None = None,
        bend: Bend | None = None,
        target_offset: int = 0,
    ) -> None:
        """A map into a buffer, from a column on. ``rows``: see `Weights.matrix`."""
        (matrix,) = self.matrices(module.weight, self.format, rows)
        bias = None if module.bias is None else self.weights.rows(module.bias, rows)
        operation = Operation(
            kind="linear",
            source=source.buffer,
            target=target,
            norm=source.norm,
            matrix=matrix,
            bias=bias,
            into=into,
            target_offset=target_offset,
            **(bend or {}),
        )
        self.ops.append(operation)

    def add_linear(
        self,
        source: Source,
        module: Linear,
        target: Target,
        *,
        change: Callable[[Tensor], Tensor] | None = None,
        scores: int = -1,
    ) -> None:
        """A map whose result is added to a buffer; ``scores``: a buffer with a factor for each row.

        ``change``: see `matrices`.
        """
        (matrix,) = self.matrices(module.weight, self.format, change=change)
        operation = Operation(
            kind="linear",
            source=source.buffer,
            target=target.buffer,
            matrix=matrix,
            bias=None if module.bias is None else self.weights.rows(module.bias),
            into="add",
            keep=target.keep,
            scale=target.scale,
            scores=scores,
        )
        self.ops.append(operation)

    def norm(self, module: NormModule) -> Norm:
        """A norm with its weights."""
        spec = module.spec
        if isinstance(module, RMSNorm):
            weight = module.weight.detach().float() + (1.0 if module.spec.unit_offset else 0.0)
            return Norm(size=spec.size, count=spec.size, eps=spec.eps, weight=self.weights.vector(weight))
        own, bias = (None if p is None else self.weights.vector(p) for p in (module.weight, module.bias))
        heads = module.spec.heads or 1
        return Norm(size=spec.size, count=spec.size, eps=spec.eps, centered=True, weight=own, bias=bias, weights=heads)

    def normed(self, source: int, norm: Norm | None, target: int, *, keep: float = 0.0) -> None:
        """target = keep * target + norm(source); without a norm a copy."""
        self.ops.append(Operation(kind="norm", source=source, target=target, keep=keep, norm=norm))


def _unchanged(weight: Tensor) -> Tensor:
    return weight


def bend(activation: Activation | ClampedSwiGLU) -> Bend:
    """An activation as fields of an operation."""
    if isinstance(activation, ClampedSwiGLU):
        return {"activation": "clamped_swiglu", "alpha": activation.alpha, "limit": activation.limit}
    return {"activation": activation}


def rounded(value: float, dtype: torch.dtype) -> float:
    """A factor as a tensor of this type holds it."""
    return float(torch.tensor(value, dtype=dtype))
