"""compressed-tensors: ``X.weight_packed`` (integers in words) or ``X.weight`` in int8 or E4M3, and ``X.weight_scale``.

Scales are [1], a column [O, 1], groups of a row [O, G], or blocks [O / n, I / m]. Packed integers of b bits lie along
in, 2^(b-1) added to each; zeros, where there are any, lie along out in the same way. What the config says of
activations does not concern the weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.checkpoint.quantized.base import CodedSource, Config, Packed
from oarsmith.checkpoint.quantized.fp8 import ACTIVATIONS, fp8_codes, fp8_weight, scale_block
from oarsmith.checkpoint.quantized.integers import (
    float_kind,
    group_size,
    integer_weight,
    numbers_on_grid,
    pack_words,
    stems,
    unpack_words,
)
from oarsmith.checkpoint.tensors import TensorSource
from oarsmith.errors import CheckpointError
from oarsmith.kernels.coded import E4M3, CodedWeight

_FLOATS = ("F16", "BF16", "F32")
_PACKED_BITS = (2, 4, 8)


class CompressedSource(CodedSource):
    """``X.weight`` from what compressed-tensors keeps of it."""

    def __init__(self, inner: TensorSource, config: Config, quantization: Config) -> None:
        super().__init__(inner)
        transforms = quantization.get("transform_config")
        if isinstance(transforms, dict) and transforms.get("config_groups"):
            raise CheckpointError(
                "the weights are rotated (transform_config), which is undone while the model runs",
                where="config.json",
                fix="use a checkpoint without online transforms",
            )
        self._weights = tuple(_weights(quantization))
        self._in_features: dict[str, int] = {}
        self._bits: dict[str, int] = {}
        self._groups: dict[str, int] = {}
        self._blocks: dict[str, tuple[int, int]] = {}
        for stem in stems(inner, ".weight_packed"):
            self._take_packed(stem, config)
        for stem in stems(self, ".weight_scale"):
            self._take_plain(stem, config)
        self._drop(*ACTIVATIONS)

    def scale_name(self, name: str) -> str:
        return f"{name}_scale"

    def _take_packed(self, stem: str, config: Config) -> None:
        name, packed = f"{stem}.weight", f"{stem}.weight_packed"
        out, words = self._shape(packed, "I32", 2)
        self._shape(f"{name}_shape", ("I64", "I32"), 1)
        shape = tuple(self._inner.read(f"{name}_shape").tolist())
        if len(shape) != 2 or shape[0] != out or shape[1] <= 0:
            raise self._misfit(f"{name}_shape", f"{shape} is not the shape of {out} packed rows")
        bits = next((b for b in _PACKED_BITS if -(-shape[1] * b // 32) == words), None)
        if bits is None:
            raise self._misfit(packed, f"{words} words are not {shape[1]} numbers of 2, 4 or 8 bits")
        scales = self._shape(f"{name}_scale", _FLOATS, 2)
        group = group_size(shape[1], scales[1], self._wanted(scales[1]))
        if scales[0] != out or group is None:
            raise self._misfit(f"{name}_scale", f"scales of shape {scales} do not fit a weight of shape {shape}")
        parts = [packed, f"{name}_shape", f"{name}_scale"]
        zeros = self._inner.shapes.get(f"{name}_zero_point")
        if zeros is not None:
            if zeros not in ((-(-out * bits // 32), scales[1]), scales):
                raise self._misfit(f"{name}_zero_point", f"zeros of shape {zeros} do not fit scales of shape {scales}")
            parts.append(f"{name}_zero_point")
        if f"{name}_g_idx" in self._inner.shapes:
            if self._shape(f"{name}_g_idx", ("I32", "I64"), 1) != (shape[1],):
                raise self._misfit(f"{name}_g_idx", f"not one group for each of {shape[1]} inputs")
            parts.append(f"{name}_g_idx")
        self._in_features[name], self._bits[name], self._groups[name] = shape[1], bits, group
        self._replace(name, (out, shape[1]), float_kind(config, self._inner.dtypes[f"{name}_scale"]), *parts)

    def _take_plain(self, stem: str, config: Config) -> None:
        name, scale = f"{stem}.weight", f"{stem}.weight_scale"
        shape, scales = self._shape(name, ("I8", "F8_E4M3"), 2), self._inner.shapes[scale]
        found = scale_block(shape, scales, self._block_structure())
        if self._inner.dtypes[name] == "I8" and found is None and len(scales) == 2 and scales[0] == shape[0]:
            group = group_size(shape[1], scales[1], self._wanted(scales[1]))
            found = None if group is None else (1, group)
        if found is None or self._inner.dtypes[scale] not in _FLOATS:
            raise self._misfit(scale, f"scales of shape {scales} do not fit a weight of shape {shape}")
        parts = [name, scale]
        if f"{name}_zero_point" in self._inner.shapes:
            if self._inner.shapes[f"{name}_zero_point"] != scales:
                raise self._misfit(f"{name}_zero_point", f"no zero for each scale of {scales}")
            parts.append(f"{name}_zero_point")
        self._blocks[name] = found
        self._replace(name, shape, float_kind(config, self._inner.dtypes[scale]), *parts)

    def packed(self, name: str) -> Packed:
        scale = self._inner.read(f"{name}_scale")
        has_zeros = f"{name}_zero_point" in self._inner.shapes
        zeros = self._inner.read(f"{name}_zero_point") if has_zeros else None
        if name in self._blocks:
            return Packed(self._plain(name, scale, zeros))
        bits, group, columns = self._bits[name], self._groups[name], None
        words = self._inner.read(f"{name}_packed")
        numbers_OI = unpack_words(words, bits)[:, : self._in_features[name]]
        if zeros is not None:
            zeros = _zeros_of(zeros, bits, len(numbers_OI), scale.shape)
        if f"{name}_g_idx" in self._inner.shapes:
            groups_I = self._inner.read(f"{name}_g_idx").long()
            if bool((groups_I >= 0).all()):  # -1 throughout: in order
                if int(groups_I.max()) >= scale.shape[1]:
                    raise self._misfit(f"{name}_g_idx", f"a group is not one of 0 to {scale.shape[1] - 1}")
                scale, zeros = scale[:, groups_I], None if zeros is None else zeros[:, groups_I]
                columns, group = torch.arange(len(groups_I)), 1
        return Packed(integer_weight(numbers_OI, scale, zeros, bits, group), columns)

    def code_names(self) -> dict[str, str]:
        return {f"{name}_packed": name for name in self._bits} | {name: name for name in self._blocks}

    def recoded(self, name: str, weight_OI: Tensor) -> Tensor:
        grid = self._checked(name)
        if grid.weight.code is E4M3:
            return fp8_codes(grid, weight_OI)
        bits = self._bits.get(name, 8)
        numbers_OI = numbers_on_grid(grid, weight_OI, bits)
        if name in self._blocks:
            return (numbers_OI ^ 128).view(torch.int8)
        return pack_words(functional.pad(numbers_OI, (0, -numbers_OI.shape[1] % (32 // bits))), bits)

    def _plain(self, name: str, scale: Tensor, zeros: Tensor | None) -> CodedWeight:
        block, weight = self._blocks[name], self._inner.read(name)
        if weight.dtype == torch.float8_e4m3fn:
            if zeros is not None and bool((zeros.float() != 0).any()):
                raise self._misfit(f"{name}_zero_point", "a zero that is not 0 beside numbers in FP8")
            return fp8_weight(weight, scale, block)
        rows = scale.reshape(-(-len(weight) // block[0]), -1).repeat_interleave(block[0], 0)[: len(weight)]
        if zeros is not None:
            zeros = zeros.reshape(-(-len(weight) // block[0]), -1).repeat_interleave(block[0], 0)[: len(weight)] + 128
        return integer_weight(weight.view(torch.uint8) ^ 128, rows, zeros, 8, block[1])

    def _block_structure(self) -> tuple[int, int]:
        for weights in self._weights:
            block = weights.get("block_structure")
            if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
                return block[0], block[1]
        return 128, 128

    def _wanted(self, groups: int) -> object:
        sizes = {weights.get("group_size") for weights in self._weights}
        return sizes.pop() if len(sizes) == 1 and groups > 1 else None


def _weights(quantization: Config) -> Iterator[Config]:
    """What each group of modules does with its weights."""
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            yield weights


def _zeros_of(zeros: Tensor, bits: int, out: int, scales: torch.Size) -> Tensor:
    """Zeros [O, G] without sign, of words along out or of numbers with a sign."""
    if zeros.dtype == torch.int32 and zeros.shape != scales:
        return unpack_words(zeros.t().contiguous(), bits).t()[:out]
    return (zeros.int() + (1 << bits - 1)).to(torch.uint8)
