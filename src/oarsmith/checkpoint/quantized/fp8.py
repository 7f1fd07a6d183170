"""FP8 (``quant_method`` fp8): ``X.weight`` in E4M3 with ``X.weight_scale_inv`` or ``X.weight_scale``.

There is one scale for the weight, for each row, or for each block of ``weight_block_size`` (DeepSeek-V3, 128 x 128; its
kernel weight_dequant multiplies by ``weight_scale_inv`` as well, whatever the name says).
"""

from __future__ import annotations

import torch
from torch import Tensor

from oarsmith.checkpoint.quantized.base import CodedSource, Config, Packed
from oarsmith.checkpoint.tensors import TensorSource
from oarsmith.errors import CheckpointError
from oarsmith.kernels.coded import E4M3, CodedWeight

SCALES = ("_scale_inv", "_scale")
KINDS = ("F32", "BF16", "F16", "F8_E8M0")
# How activations and caches are to be rounded.
ACTIVATIONS = (".input_scale", ".input_zero_point", ".output_scale", ".k_scale", ".v_scale", ".q_scale")
_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_ACTIVATION_SCALES = (".activation_scale", ".input_scale_ub")


class Fp8Source(CodedSource):
    """``X.weight`` = E4M3 weight times the scale of its block."""

    def __init__(self, inner: TensorSource, config: Config, quantization: Config) -> None:
        super().__init__(inner)
        block = quantization.get("weight_block_size") or [128, 128]
        if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
            raise CheckpointError(f"weight_block_size {block!r} is not two positive numbers", where="config.json")
        self._scales: dict[str, tuple[str, tuple[int, int]]] = {}
        for ending in SCALES:
            for scale in [name for name in inner.shapes if name.endswith("weight" + ending)]:
                weight = scale.removesuffix(ending)
                shape = inner.shapes.get(weight, ())
                found = scale_block(shape, inner.shapes[scale], (block[0], block[1]))
                if found is None or inner.dtypes[weight] != "F8_E4M3" or inner.dtypes[scale] not in KINDS:
                    what = f"scales of shape {inner.shapes[scale]} do not fit a weight of shape {shape}"
                    raise self._misfit(scale, what)
                self._scales[weight] = (scale, found)
                self._replace(weight, shape, "BF16", scale, weight)
        packed = sorted(name for name, code in self.dtypes.items() if code.startswith("F8"))
        if packed:
            raise self._misfit(packed[0], "an FP8 weight without its weight_scale_inv or weight_scale")
        self._drop(*ACTIVATIONS, *_ACTIVATION_SCALES)

    def scale_name(self, name: str) -> str:
        return self._scales[name][0]

    def packed(self, name: str) -> Packed:
        scale, block = self._scales[name]
        return Packed(fp8_weight(self._inner.read(name), self._inner.read(scale), block))

    def code_names(self) -> dict[str, str]:
        return {name: name for name in self._scales}

    def recoded(self, name: str, weight_OI: Tensor) -> Tensor:
        return fp8_codes(self._checked(name), weight_OI)


def fp8_codes(grid: Packed, weight_OI: Tensor) -> Tensor:
    """Another weight in E4M3 on the scales of this one."""
    group_I = torch.arange(weight_OI.shape[1]) // grid.weight.group
    scaled = (weight_OI / grid.weight.scale_OG.float()[:, group_I]).nan_to_num(0.0)
    return scaled.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)


def scale_block(shape: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None: these scales are no weight's of this shape."""
    if len(shape) != 2 or 0 in shape:
        return None
    rows, columns = shape
    if scale in ((), (1,), (1, 1)):
        return rows, columns
    if scale in ((rows,), (rows, 1)):
        return 1, columns
    blocks = (-(-rows // block[0]), -(-columns // block[1]))
    return block if scale == blocks else None


def fp8_weight(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> CodedWeight:
    """A weight in E4M3 with its scales, those of each row beside it."""
    out_features, in_features = weight.shape
    grid = scale.reshape(-(-out_features // block[0]), -(-in_features // block[1]))
    if not grid.dtype.is_floating_point or grid.dtype.itemsize == 1:
        grid = grid.float()
    rows = grid.repeat_interleave(block[0], 0)[:out_features] if len(grid) != out_features else grid
    codes = weight.view(torch.uint8)
    return CodedWeight(code=E4M3, group=block[1], in_features=in_features, codes_OB=codes, scale_OG=rows)
