"""GPTQ, which vLLM, SGLang, transformers and GPTQModel read; tensors as in `oarsmith.checkpoint.quantized.gptq`.

Version 1 stores zero - 1, taken from whole words, as GPTQModel does (convert_gptq_v2_to_v1_format_module): what a zero
of 0 borrows from its neighbour comes back where 1 is added to the word, but kernels that add 1 to each number by itself
see another zero. Version 2 stores the zeros as they are. Shapes: O out, I in features, G groups of a row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from oarsmith.checkpoint.quantized.integers import pack_words
from oarsmith.checkpoint.safetensors_stream import TensorInfo
from oarsmith.quantize.grid import Grid, Quantized
from oarsmith.quantize.layouts.base import Layout, require_rows, require_weight_only, require_whole_groups
from oarsmith.quantize.layouts.contents import HEAD, Contents, FileMap, usual_scheme
from oarsmith.quantize.layouts.pieces import whole_zeros

_BITS = (2, 3, 4, 8)


class Gptq(Layout):
    """``X.qweight``, ``X.qzeros``, ``X.scales`` and ``X.g_idx``."""

    def __init__(self, *, plain_zeros: bool) -> None:
        self.name = "gptq_v2" if plain_zeros else "gptq"
        self._plain_zeros = plain_zeros

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def check(self, contents: Contents) -> None:
        require_rows(self, contents)
        require_weight_only(self, contents)
        for one in contents.maps.values():
            bits = one.grid.bits
            if bits not in _BITS:
                raise self.refused(f"{bits} bits", one.tensor)
            require_whole_groups(self, one)
            if one.in_features * bits % 32 or one.out_features * bits % 32:
                shape = (one.out_features, one.in_features)
                fix = "leave the map in floats, or use compressed-tensors"
                raise self.refused(f"a weight of shape {shape} in words of {32 / bits:g} numbers", one.tensor, fix)

    def infos(self, one: FileMap, dtype: torch.dtype) -> Mapping[str, TensorInfo]:
        bits, groups = one.grid.bits, one.grid.num_groups(one.in_features)
        return {
            f"{one.stem}.qweight": TensorInfo(torch.int32, (one.in_features * bits // 32, one.out_features)),
            f"{one.stem}.qzeros": TensorInfo(torch.int32, (groups, one.out_features * bits // 32)),
            f"{one.stem}.scales": TensorInfo(torch.float16, (groups, one.out_features)),
            f"{one.stem}.g_idx": TensorInfo(torch.int32, (one.in_features,)),
        }

    def tensors(self, one: FileMap, quantized: Quantized, input_scale: Tensor | None) -> Mapping[str, Tensor]:
        zeros_GO, bits = whole_zeros(quantized, one.tensor).t(), one.grid.bits
        return {
            f"{one.stem}.qweight": pack_words(quantized.numbers_OI, bits).t(),
            f"{one.stem}.qzeros": pack_words(zeros_GO, bits) if self._plain_zeros else self._less_one(zeros_GO, one),
            f"{one.stem}.scales": quantized.steps.scale_OG.t(),
            f"{one.stem}.g_idx": torch.arange(one.in_features) // one.grid.group_of(one.in_features),
        }

    def _less_one(self, zeros_GO: Tensor, one: FileMap) -> Tensor:
        bits = one.grid.bits
        if 32 % bits:
            # Numbers cross words here, and readers disagree on what a borrow does.
            if bool((zeros_GO == 0).any()):
                raise self.refused(f"a zero of 0 in {bits} bits", one.tensor, "use gptq_v2")
            return pack_words(zeros_GO - 1, bits)
        ones = sum(1 << place for place in range(0, 32, bits))
        return ((pack_words(zeros_GO, bits).long() & 0xFFFFFFFF) - ones).to(torch.int32)

    def config(self, contents: Contents) -> dict[str, Any]:
        usual = usual_scheme(contents)
        grid = usual.weights
        assert grid is not None
        kept = [stem for stem in contents.kept if stem != HEAD]
        dynamic: dict[str, dict[str, Any]] = {f"-:^{re.escape(stem)}$": {} for stem in kept}
        dynamic |= {
            f"+:^{re.escape(one.stem)}$": _numbers(one.grid) for one in contents.maps.values() if one.grid != grid
        }
        return {
            "quant_method": "gptq",
            **_numbers(grid),
            "desc_act": False,
            "lm_head": False,
            "true_sequential": True,
            "checkpoint_format": self.name,
            **({"dynamic": dynamic} if dynamic else {}),
        }

    def side_files(self, contents: Contents) -> Mapping[str, str]:
        return {"quantize_config.json": json.dumps(self.config(contents), indent=2) + "\n"}


def _numbers(grid: Grid) -> dict[str, Any]:
    return {"bits": grid.bits, "group_size": -1 if grid.group is None else grid.group, "sym": grid.symmetric}
