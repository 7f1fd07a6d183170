"""NF4 as bitsandbytes keeps it, which transformers, PEFT and vLLM read; tensors as in the reader
(`oarsmith.checkpoint.quantized.bitsandbytes`).

Shapes: O out, I in features, G groups of a row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from oarsmith.checkpoint.convert import DTYPE_NAMES
from oarsmith.checkpoint.safetensors_stream import TensorInfo
from oarsmith.kernels.coded import NF4, pack_pairs
from oarsmith.quantize.grid import Quantized
from oarsmith.quantize.layouts.base import Layout, require_rows, require_whole_groups
from oarsmith.quantize.layouts.contents import Contents, FileMap, usual_scheme

_STATE = "quant_state.bitsandbytes__nf4"


class BitsAndBytes(Layout):
    """``X.weight`` in bytes, ``X.weight.absmax``, and what describes them."""

    name = "bitsandbytes"

    def __init__(self, contents: Contents) -> None:
        self._dtype = DTYPE_NAMES[contents.dtype]

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def check(self, contents: Contents) -> None:
        require_rows(self, contents)
        usual = usual_scheme(contents)
        for one in contents.maps.values():
            if one.grid.code != "nf4" or one.scheme != usual:
                raise self.refused("other numbers than NF4", one.tensor)
            # Blocks lie along the flat weight: only so are they those of its rows.
            require_whole_groups(self, one)
        if contents.scheme.cache is not None:
            raise self.refused("scales of keys and values", "cache")

    def _state(self, one: FileMap) -> Tensor:
        said = {
            "quant_type": "nf4",
            "blocksize": one.grid.group_of(one.in_features),
            "dtype": self._dtype,
            "shape": [one.out_features, one.in_features],
        }
        return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    def infos(self, one: FileMap, dtype: torch.dtype) -> Mapping[str, TensorInfo]:
        name, numel = f"{one.stem}.weight", one.out_features * one.in_features
        return {
            name: TensorInfo(torch.uint8, (numel // 2, 1)),
            f"{name}.absmax": TensorInfo(torch.float32, (numel // one.grid.group_of(one.in_features),)),
            f"{name}.quant_map": TensorInfo(torch.float32, (len(NF4.values),)),
            f"{name}.{_STATE}": TensorInfo(torch.uint8, tuple(self._state(one).shape)),
        }

    def tensors(self, one: FileMap, quantized: Quantized, input_scale: Tensor | None) -> Mapping[str, Tensor]:
        name = f"{one.stem}.weight"
        return {
            name: pack_pairs(quantized.numbers_OI),
            f"{name}.absmax": quantized.steps.scale_OG,
            f"{name}.quant_map": torch.tensor(NF4.values),
            f"{name}.{_STATE}": self._state(one),
        }

    def config(self, contents: Contents) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": self._dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(contents.kept),
        }
