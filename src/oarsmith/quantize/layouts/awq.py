"""AWQ, version gemm, which vLLM, SGLang and transformers read; tensors as in `oarsmith.checkpoint.quantized.awq`.

Shapes: O out, I in features, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from oarsmith.checkpoint.quantized.awq import awq_words
from oarsmith.checkpoint.safetensors_stream import TensorInfo
from oarsmith.quantize.grid import Quantized
from oarsmith.quantize.layouts.base import Layout, require_rows, require_weight_only, require_whole_groups
from oarsmith.quantize.layouts.contents import Contents, FileMap, usual_scheme
from oarsmith.quantize.layouts.pieces import whole_zeros

_BITS = 4
_A_WORD = 32 // _BITS


class Awq(Layout):
    """``X.qweight``, ``X.qzeros`` and ``X.scales``."""

    name = "awq"
    elsewhere = "gptq or compressed-tensors"

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def check(self, contents: Contents) -> None:
        require_rows(self, contents)
        require_weight_only(self, contents)
        usual = usual_scheme(contents)
        for one in contents.maps.values():
            if one.grid.bits != _BITS:
                raise self.refused(f"{one.grid.bits} bits", one.tensor)
            if one.scheme != usual:
                raise self.refused("maps of several kinds", one.tensor)
            require_whole_groups(self, one)
            if one.out_features % _A_WORD:
                fix = "leave the map in floats, or use compressed-tensors"
                raise self.refused(f"{one.out_features} rows, which are not words of {_A_WORD}", one.tensor, fix)

    def infos(self, one: FileMap, dtype: torch.dtype) -> Mapping[str, TensorInfo]:
        words, groups = one.out_features // _A_WORD, one.grid.num_groups(one.in_features)
        return {
            f"{one.stem}.qweight": TensorInfo(torch.int32, (one.in_features, words)),
            f"{one.stem}.qzeros": TensorInfo(torch.int32, (groups, words)),
            f"{one.stem}.scales": TensorInfo(torch.float16, (groups, one.out_features)),
        }

    def tensors(self, one: FileMap, quantized: Quantized, input_scale: Tensor | None) -> Mapping[str, Tensor]:
        return {
            f"{one.stem}.qweight": awq_words(quantized.numbers_OI.t()),
            f"{one.stem}.qzeros": awq_words(whole_zeros(quantized, one.tensor).t()),
            f"{one.stem}.scales": quantized.steps.scale_OG.t(),
        }

    def config(self, contents: Contents) -> dict[str, Any]:
        grid = usual_scheme(contents).weights
        assert grid is not None
        return {
            "quant_method": "awq",
            "bits": _BITS,
            "group_size": -1 if grid.group is None else grid.group,
            # Zeros are stored in any case; kernels for files without them expect other numbers.
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(contents.kept),
        }
