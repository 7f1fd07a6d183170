"""Model directories whose linear weights are quantized, written here as the formats' descriptions say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 16
Made = tuple[dict[str, Tensor], Tensor]
"""The tensors that replace a weight, by what follows its module's name, and the weight they stand for."""


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Numbers along the first axis in a stream of bits, lowest first, in words of 32."""
    columns = []
    for column in numbers.t().tolist():
        stream = sum(number << bits * place for place, number in enumerate(column))
        columns.append([stream >> 32 * word & 0xFFFFFFFF for word in range(len(column) * bits // 32)])
    return torch.from_numpy(np.array(columns, dtype=np.uint32).view(np.int32).T.copy())


def _steps(weight: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers [O, I] of 4 bits, scales and zeros [O, G]."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).to(scale_dtype)
    zero = (-low / scale.float()).round().clamp(1, 15).to(torch.int64)
    numbers = (groups / scale.float()[..., None]).round() + zero[..., None]
    return numbers.clamp(0, 15).to(torch.int64).flatten(1), scale, zero


def _floats(numbers: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return ((numbers.unflatten(1, (-1, GROUP)) - zero[..., None]) * scale.float()[..., None]).flatten(1)


def gptq(weight: Tensor) -> Made:
    numbers, scale, zero = _steps(weight, torch.float16)
    tensors = {
        "qweight": pack(numbers.t(), 4),
        "qzeros": pack(zero - 1, 4).t().contiguous(),
        "scales": scale.t().contiguous(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }
    return tensors, _floats(numbers, scale, zero)


def awq(weight: Tensor) -> Made:
    numbers, scale, zero = _steps(weight, torch.float16)

    def words(columns: Tensor) -> Tensor:
        """Rows of numbers, eight a word in the order of AWQ."""
        return pack(columns.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1).t(), 4).t().contiguous()

    tensors = {"qweight": words(numbers.t()), "qzeros": words(zero.t()), "scales": scale.t().contiguous()}
    return tensors, _floats(numbers, scale, zero)


def packed_int4(weight: Tensor) -> Made:
    numbers, scale, zero = _steps(weight, torch.bfloat16)
    tensors = {
        "weight_packed": pack(numbers.t(), 4).t().contiguous(),
        "weight_scale": scale,
        "weight_zero_point": pack(zero, 4),
        "weight_shape": torch.tensor(weight.shape),
    }
    return tensors, _floats(numbers, scale, zero)


def fp8(weight: Tensor) -> Made:
    """Blocks of 16 x 16, of which the last ones may be smaller."""
    factors = torch.empty(weight.shape)
    scale = torch.empty(-(-weight.shape[0] // 16), -(-weight.shape[1] // 16))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = slice(16 * i, 16 * i + 16), slice(16 * j, 16 * j + 16)
            scale[i, j] = weight[part].float().abs().max() / 448
            factors[part] = scale[i, j]
    codes = (weight.float() / factors).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale}, codes.float() * factors


FORMATS: dict[str, tuple[Callable[[Tensor], Made], dict[str, Any]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
    "pack-quantized": (
        packed_int4,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": GROUP}}},
        },
    ),
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [16, 16]}),
}


def quantize_directory(folder: Path, kind: str, chosen: Callable[[str], bool]) -> dict[str, Tensor]:
    """Rewrite a model directory's chosen weights, and give the floats that they now stand for."""
    make, quantization = FORMATS[kind]
    weights, floats = load_file(folder / "model.safetensors"), {}
    for name in [name for name in weights if name.endswith(".weight") and chosen(name)]:
        tensors, floats[name] = make(weights.pop(name))
        weights |= {name.removesuffix("weight") + part: tensor for part, tensor in tensors.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return floats
