"""FP8 in blocks as DeepSeek-V3's own files have it, which vLLM, SGLang and transformers read.

``X.weight`` in E4M3, ``X.weight_scale_inv`` in fp32 for each block: what the numbers are multiplied by, whatever the
name says. Inputs are rounded as they come, with a scale for each token and run of columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from oarsmith.checkpoint.safetensors_stream import TensorInfo
from oarsmith.models.rounding import Activations
from oarsmith.quantize.grid import Quantized
from oarsmith.quantize.layouts.base import Layout, require_rows
from oarsmith.quantize.layouts.contents import Contents, FileMap, usual_scheme
from oarsmith.quantize.layouts.pieces import block_scales, num_row_blocks


class NativeFp8(Layout):
    """``X.weight`` and ``X.weight_scale_inv``."""

    name = "fp8"

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def check(self, contents: Contents) -> None:
        require_rows(self, contents)
        usual = usual_scheme(contents)
        for one in contents.maps.values():
            grid = one.grid
            if grid.code != "e4m3" or grid.group is None or grid.rows in (1, None):
                raise self.refused("other numbers than E4M3 in blocks", one.tensor)
            if one.scheme != usual:
                raise self.refused("blocks of several sizes", one.tensor)
            if one.scheme.activations != Activations(code="e4m3", group=grid.group):
                raise self.refused(f"inputs that are not rounded in runs of {grid.group} columns", one.tensor)
        if contents.scheme.cache is not None:
            raise self.refused("scales of keys and values", "cache")

    def infos(self, one: FileMap, dtype: torch.dtype) -> Mapping[str, TensorInfo]:
        shape = (one.out_features, one.in_features)
        scales = (num_row_blocks(one.grid, one.out_features), one.grid.num_groups(one.in_features))
        return {
            f"{one.stem}.weight": TensorInfo(torch.float8_e4m3fn, shape),
            f"{one.stem}.weight_scale_inv": TensorInfo(torch.float32, scales),
        }

    def tensors(self, one: FileMap, quantized: Quantized, input_scale: Tensor | None) -> Mapping[str, Tensor]:
        return {
            f"{one.stem}.weight": quantized.numbers_OI,
            f"{one.stem}.weight_scale_inv": block_scales(quantized, one.tensor),
        }

    def config(self, contents: Contents) -> dict[str, Any]:
        grid = usual_scheme(contents).weights
        assert grid is not None
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [grid.rows, grid.group],
            # The first is what vLLM looks for, the second what transformers does.
            "ignored_layers": list(contents.kept),
            "modules_to_not_convert": list(contents.kept),
        }
