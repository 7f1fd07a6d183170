"""What readers of quantized formats share: tensors of another source replaced by the weights that they make."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oarsmith.checkpoint.tensors import FLOATS, TensorSource
from oarsmith.errors import CheckpointError
from oarsmith.kernels.coded import E4M3, CodedWeight, decode

Config = Mapping[str, Any]


class Replaced(TensorSource):
    """Another source with some tensors replaced by virtual ones."""

    def __init__(self, inner: TensorSource) -> None:
        self.directory, self._inner = inner.directory, inner
        self.shapes, self.dtypes = dict(inner.shapes), dict(inner.dtypes)
        self._virtual: set[str] = set()

    def _replace(self, name: str, shape: tuple[int, ...], dtype: str, *parts: str) -> None:
        """``parts`` go, and ``name`` comes; it may be one of them."""
        for part in parts:
            del self.shapes[part], self.dtypes[part]
        if name in self.shapes:
            raise self._misfit(name, "the weight is there twice, in floats and quantized")
        self.shapes[name], self.dtypes[name] = shape, dtype
        self._virtual.add(name)

    def _drop(self, *endings: str) -> None:
        """Leave out tensors that say nothing of the weights."""
        for name in [name for name in self.shapes if name.endswith(endings)]:
            del self.shapes[name], self.dtypes[name]

    def _misfit(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(what, where=f"{self.directory}: {name}", fix="copy the model again")

    def _shape(self, name: str, kinds: str | tuple[str, ...], num_axes: int) -> tuple[int, ...]:
        """Shape of a tensor of the files, which is of one of these dtypes."""
        shape, kind = self._inner.shapes.get(name), self._inner.dtypes.get(name)
        kinds = (kinds,) if isinstance(kinds, str) else kinds
        if shape is None:
            raise self._misfit(name, "the tensor is missing")
        if kind not in kinds or len(shape) != num_axes:
            raise self._misfit(name, f"{kind} of shape {shape} is not {' or '.join(kinds)} with {num_axes} axes")
        return shape

    @abstractmethod
    def unpack(self, name: str) -> Tensor:
        """A virtual tensor."""

    def read(self, name: str) -> Tensor:
        return self.unpack(name) if name in self._virtual else self._inner.read(name)

    def read_into(self, name: str, target: Tensor) -> None:
        if name in self._virtual:
            super().read_into(name, target)
        else:
            self._inner.read_into(name, target)

    def close(self) -> None:
        self._inner.close()


@dataclass(frozen=True)
class Packed:
    """A coded weight [O, I]; ``columns``: its column of each input, where the codes lie in another order.

    ``shape``: of the tensor, where the codes are those of its flat numbers.
    """

    weight: CodedWeight
    columns: Tensor | None = None
    shape: tuple[int, ...] | None = None


class CodedSource(Replaced):
    """A source whose virtual tensors are coded weights."""

    @abstractmethod
    def packed(self, name: str) -> Packed:
        """A virtual tensor's codes.

        Raises:
            CheckpointError: its parts contradict each other.
        """

    def _checked(self, name: str) -> Packed:
        packed = self.packed(name)
        weight = packed.weight
        if not bool(torch.isfinite(weight.scale_OG).all()):
            raise self._misfit(self.scale_name(name), "a scale is NaN or infinite")
        if weight.code is E4M3 and bool(((weight.codes_OB & 127) == 127).any()):
            raise self._misfit(name, "a weight is NaN or infinite")
        return packed

    @abstractmethod
    def scale_name(self, name: str) -> str:
        """The file's tensor of scales, for messages."""

    @property
    def has_codes(self) -> bool:
        """Whether anything is quantized."""
        return bool(self._virtual)

    def coded(self, name: str) -> CodedWeight | None:
        if name not in self._virtual:
            return None
        packed = self._checked(name)
        plain = packed.columns is None and packed.shape is None
        return packed.weight if plain else None

    def code_names(self) -> dict[str, str]:
        """The files' tensors of codes, and the weight that each belongs to; empty: this format is not written."""
        return {}

    def recoded(self, name: str, weight_OI: Tensor) -> Tensor:
        """The codes of another fp32 weight on the scales and zeros of a virtual tensor, as the files have them."""
        raise NotImplementedError(type(self).__name__)

    def unpack(self, name: str) -> Tensor:
        packed = self._checked(name)
        result = decode(packed.weight, FLOATS[self.dtypes[name]])
        if not bool(torch.isfinite(result).all()):
            raise self._misfit(name, "a weight is NaN or infinite")
        if packed.columns is not None:
            result = result[:, packed.columns]
        return result if packed.shape is None else result.view(packed.shape)
