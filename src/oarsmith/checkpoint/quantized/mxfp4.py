"""MXFP4 (gpt-oss): ``X_blocks`` with two E2M1 numbers a byte, ``X_scales`` with an exponent (E8M0) for each 32 of them.

``X`` is then [experts, in, out]. OCP Microscaling Formats (MX) Specification 1.0, 5.3.3 and 5.4.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oarsmith.checkpoint.quantized.base import Config, Replaced
from oarsmith.checkpoint.tensors import TensorSource

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class Mxfp4Source(Replaced):
    """``X`` [experts, in, out] from ``X_blocks`` [experts, out, groups, 16] and ``X_scales`` [experts, out, groups]."""

    def __init__(self, inner: TensorSource, config: Config, quantization: Config) -> None:
        super().__init__(inner)
        for name in [name for name in inner.shapes if name.endswith("_blocks")]:
            stem, shape = name.removesuffix("_blocks"), inner.shapes[name]
            scales = inner.shapes.get(f"{stem}_scales")
            kinds = {inner.dtypes[name], inner.dtypes.get(f"{stem}_scales")}
            if len(shape) != 4 or scales != shape[:3] or kinds != {"U8"}:
                raise self._misfit(name, f"blocks of shape {shape} do not fit scales of shape {scales}")
            experts, out, groups, half = shape
            self._replace(stem, (experts, groups * half * 2, out), "BF16", name, f"{stem}_scales")

    def unpack(self, name: str) -> Tensor:
        blocks, scales = self._inner.read(f"{name}_blocks"), self._inner.read(f"{name}_scales")
        if bool((scales == 255).any()):
            raise self._misfit(f"{name}_scales", "a scale is NaN")
        table = torch.tensor(_E2M1, dtype=torch.bfloat16)
        result = torch.empty(self.shapes[name], dtype=torch.bfloat16)
        for expert in range(blocks.shape[0]):
            pairs = blocks[expert].int()  # two numbers a byte, the low half first
            numbers = torch.stack((table[pairs & 15], table[pairs >> 4]), dim=-1).flatten(-2)
            scaled = torch.ldexp(numbers, scales[expert].int().sub(127).unsqueeze(-1))
            result[expert] = scaled.flatten(-2).t()
        if not bool(torch.isfinite(result).all()):
            raise self._misfit(name, "a weight is infinite")
        return result
