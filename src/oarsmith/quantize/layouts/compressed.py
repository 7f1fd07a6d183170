"""compressed-tensors, which vLLM, SGLang and transformers read: packed integers, int8, and FP8.

Tensors as in `oarsmith.checkpoint.quantized.compressed`; the package compressed-tensors 0.19 describes them
(compressors/pack_quantized, compressors/naive_quantized). Shapes: O out, I in features, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.checkpoint.quantized.integers import pack_words
from oarsmith.checkpoint.safetensors_stream import TensorInfo
from oarsmith.quantize.grid import Quantized
from oarsmith.quantize.layouts.base import Layout, require_rows, require_whole_groups
from oarsmith.quantize.layouts.compressed_config import (
    FLOAT,
    INT,
    PACKED,
    format_of,
    quantization_config,
)
from oarsmith.quantize.layouts.contents import Contents, FileMap
from oarsmith.quantize.layouts.pieces import block_scales, num_row_blocks, whole_zeros

_PACKED_BITS = (2, 4, 8)


class CompressedTensors(Layout):
    """``X.weight_packed`` or ``X.weight``, ``X.weight_scale``, and what goes with them."""

    name = "compressed-tensors"
    elsewhere = "gptq or gguf"

    def check(self, contents: Contents) -> None:
        require_rows(self, contents)
        for one in contents.maps.values():
            grid = one.grid
            kind = format_of(one.scheme)
            if kind == FLOAT:
                if (grid.group is None) != (grid.rows in (1, None)):
                    what = "E4M3 scales that are not those of rows, of blocks or of the weight"
                    raise self.refused(what, one.tensor, "choose one of these")
                continue
            if grid.rows != 1:
                raise self.refused("integers whose rows share scales", one.tensor, "give each row its own scales")
            if kind == PACKED and grid.bits not in _PACKED_BITS:
                raise self.refused(f"{grid.bits} bits that readers agree on", one.tensor)
            require_whole_groups(self, one)

    def infos(self, one: FileMap, dtype: torch.dtype) -> Mapping[str, TensorInfo]:
        grid, name, shape = one.grid, f"{one.stem}.weight", (one.out_features, one.in_features)
        kind, groups = format_of(one.scheme), grid.num_groups(one.in_features)
        scales = (num_row_blocks(grid, one.out_features), groups)
        if kind == FLOAT and grid.rows is None and grid.group is None:
            scales_shape: tuple[int, ...] = (1,)
        else:
            scales_shape = scales
        found = {f"{name}_scale": TensorInfo(dtype, scales_shape)}
        if kind == PACKED:
            words = -(-one.in_features * grid.bits // 32)
            found[f"{name}_packed"] = TensorInfo(torch.int32, (one.out_features, words))
            found[f"{name}_shape"] = TensorInfo(torch.int64, (2,))
            if not grid.symmetric:
                zero_words = -(-one.out_features * grid.bits // 32)
                found[f"{name}_zero_point"] = TensorInfo(torch.int32, (zero_words, groups))
        else:
            found[name] = TensorInfo(torch.float8_e4m3fn if kind == FLOAT else torch.int8, shape)
            if kind == INT and not grid.symmetric:
                found[f"{name}_zero_point"] = TensorInfo(torch.int8, scales_shape)
        if one.scheme.activations is not None and one.scheme.activations.static:
            found[f"{one.stem}.input_scale"] = TensorInfo(dtype, (1,))
        return found

    def tensors(self, one: FileMap, quantized: Quantized, input_scale: Tensor | None) -> Mapping[str, Tensor]:
        grid, name, numbers = one.grid, f"{one.stem}.weight", quantized.numbers_OI
        kind = format_of(one.scheme)
        found = {f"{name}_scale": block_scales(quantized, one.tensor)}
        if kind == PACKED:
            found[f"{name}_packed"] = _packed(numbers, grid.bits)
            found[f"{name}_shape"] = torch.tensor(numbers.shape)
            if not grid.symmetric:
                zeros_OG = whole_zeros(quantized, one.tensor)
                found[f"{name}_zero_point"] = _packed(zeros_OG.t(), grid.bits).t()
        elif kind == FLOAT:
            found[name] = numbers
        else:
            found[name] = numbers.to(torch.int16) - grid.middle
            if not grid.symmetric:
                found[f"{name}_zero_point"] = whole_zeros(quantized, one.tensor).to(torch.int16) - grid.middle
        if input_scale is not None:
            found[f"{one.stem}.input_scale"] = input_scale
        return found

    def cache_infos(self, attention: str, dtype: torch.dtype, num_scales: int) -> Mapping[str, TensorInfo]:
        shape = (1,) if num_scales == 1 else (num_scales, 1, 1)
        return {f"{attention}.{part}_scale": TensorInfo(dtype, shape) for part in ("k", "v")}

    def cache_tensors(self, attention: str, key_scale_H: Tensor, value_scale_H: Tensor) -> Mapping[str, Tensor]:
        return {f"{attention}.k_scale": key_scale_H, f"{attention}.v_scale": value_scale_H}

    def config(self, contents: Contents) -> dict[str, Any]:
        return quantization_config(contents)


def _packed(numbers: Tensor, bits: int) -> Tensor:
    """Numbers along the last axis in words; what is missing from the last word is 0."""
    return pack_words(functional.pad(numbers, (0, -numbers.shape[-1] % 32)), bits)[
        ..., : -(-numbers.shape[-1] * bits // 32)
    ]
