"""Weights released in packed float formats, shown as the bfloat16 weights they stand for, one tensor at a time.

Block FP8 (DeepSeek-V3): ``X.weight`` in E4M3 with ``X.weight_scale_inv``, one float32 factor for each 128 x 128 block.
MXFP4 (gpt-oss): ``X_blocks`` with two E2M1 numbers a byte and ``X_scales``, one exponent (E8M0) for each 32 of them;
``X`` is then [experts, in, out]. OCP Microscaling Formats (MX) Specification 1.0, 5.3.3 and 5.4.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from oarsmith.checkpoint.tensors import TensorSource
from oarsmith.errors import CheckpointError

_SCALE = "_scale_inv"
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def unpacked(config: Mapping[str, Any], source: TensorSource) -> tuple[dict[str, Any], TensorSource]:
    """Config and tensors of the plain model; both as they are where nothing is packed.

    Raises:
        CheckpointError: a packed tensor without its scales, or scales of another shape.
    """
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method not in ("fp8", "mxfp4") or not isinstance(quantization, dict):
        return dict(config), source
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if method == "mxfp4":
        return plain, Mxfp4Source(source)
    block = quantization.get("weight_block_size") or [128, 128]
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise CheckpointError(f"weight_block_size {block!r} is not two positive numbers", where="config.json")
    return plain, BlockFp8Source(source, (block[0], block[1]))


class _Wrapped(TensorSource):
    """Another source with some tensors replaced by virtual ones."""

    def __init__(self, inner: TensorSource) -> None:
        self.directory, self._inner = inner.directory, inner
        self.shapes, self.dtypes = dict(inner.shapes), dict(inner.dtypes)
        self._virtual: set[str] = set()

    def _replace(self, name: str, shape: tuple[int, ...], *parts: str) -> None:
        for part in parts:
            del self.shapes[part], self.dtypes[part]
        self.shapes[name], self.dtypes[name] = shape, "BF16"
        self._virtual.add(name)

    def _misfit(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(what, where=f"{self.directory}: {name}", fix="copy the model again")

    def unpack(self, name: str) -> Tensor:
        raise NotImplementedError

    def read(self, name: str) -> Tensor:
        return self.unpack(name) if name in self._virtual else self._inner.read(name)

    def close(self) -> None:
        self._inner.close()


class BlockFp8Source(_Wrapped):
    """``X.weight`` = E4M3 weight times the factor of its block. DeepSeek-V3's weight_dequant kernel does the same."""

    def __init__(self, inner: TensorSource, block: tuple[int, int]) -> None:
        super().__init__(inner)
        self._block = block
        for name in [name for name in inner.shapes if name.endswith("weight" + _SCALE)]:
            weight, shape = name.removesuffix(_SCALE), inner.shapes.get(name.removesuffix(_SCALE), ())
            blocks = tuple(-(-size // step) for size, step in zip(shape, block, strict=False))
            if len(shape) != 2 or inner.dtypes[weight] != "F8_E4M3" or inner.shapes[name] != blocks:
                raise self._misfit(name, f"scales of shape {inner.shapes[name]} do not fit a weight of shape {shape}")
            self._replace(weight, shape, name, weight)
        packed = sorted(name for name, code in self.dtypes.items() if code.startswith("F8"))
        if packed:
            raise self._misfit(packed[0], "an FP8 weight without its weight_scale_inv")

    def unpack(self, name: str) -> Tensor:
        weight, scale = self._inner.read(name), self._inner.read(name + _SCALE).float()
        if not bool(torch.isfinite(scale).all()):
            raise self._misfit(name + _SCALE, "a scale is NaN or infinite")
        rows, columns = (min(step, size) for step, size in zip(self._block, weight.shape, strict=True))
        result = torch.empty(weight.shape, dtype=torch.bfloat16)
        for index in range(scale.shape[0]):  # a row of blocks at a time: float32 copies stay small
            part = slice(index * rows, (index + 1) * rows)
            factors = scale[index].repeat_interleave(columns)[: weight.shape[1]]
            result[part] = weight[part].float() * factors
        if not bool(torch.isfinite(result).all()):
            raise self._misfit(name, "a weight is NaN or infinite")
        return result


class Mxfp4Source(_Wrapped):
    """``X`` [experts, in, out] from ``X_blocks`` [experts, out, groups, 16] and ``X_scales`` [experts, out, groups]."""

    def __init__(self, inner: TensorSource) -> None:
        super().__init__(inner)
        for name in [name for name in inner.shapes if name.endswith("_blocks")]:
            stem, shape = name.removesuffix("_blocks"), inner.shapes[name]
            scales = inner.shapes.get(f"{stem}_scales")
            kinds = {inner.dtypes[name], inner.dtypes.get(f"{stem}_scales")}
            if len(shape) != 4 or scales != shape[:3] or kinds != {"U8"}:
                raise self._misfit(name, f"blocks of shape {shape} do not fit scales of shape {scales}")
            experts, out, groups, half = shape
            self._replace(stem, (experts, groups * half * 2, out), name, f"{stem}_scales")

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
