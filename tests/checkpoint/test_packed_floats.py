"""Packed float formats, against transformers' own dequantisation and plain arithmetic."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import oarsmith
from oarsmith.checkpoint.convert import convert_directory
from oarsmith.checkpoint.quantized.unpacked import unpacked
from oarsmith.checkpoint.source import open_model, open_source
from oarsmith.errors import CheckpointError
from tiny import write_tiny_model

FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16], "fmt": "e4m3"}}
MXFP4 = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []}}


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny models."""


def quantize(weight: Tensor, block: tuple[int, int] = (16, 16)) -> tuple[Tensor, Tensor]:
    """E4M3 and one factor a block, as DeepSeek's exporter: the largest value of a block becomes 448."""
    rows, columns = (math.ceil(size / step) for size, step in zip(weight.shape, block, strict=True))
    scale, packed = torch.empty(rows, columns), torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scale[i, j] = weight[part].abs().max() / 448
            packed[part] = (weight[part] / scale[i, j]).to(torch.float8_e4m3fn)
    return packed, scale


def fp8_model(folder: Path) -> Path:
    """A Llama whose linear weights are block FP8; 48 and 40 do not fill their last blocks."""
    write_tiny_model(folder, "llama", intermediate_size=40)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if "proj" in name]:
        weights[name], weights[name + "_scale_inv"] = quantize(weights[name])
    others = {n: t.bfloat16() if t.dtype == torch.float32 and "scale_inv" not in n else t for n, t in weights.items()}
    save_file(others, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | FP8
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(folder: Path, config: dict[str, Any], name: str) -> Tensor:
    with unpacked(config, open_source(folder))[1] as source:
        return source.read(name)


@pytest.mark.parametrize("shape", [(32, 48), (16, 16)])
def test_block_fp8(shape: tuple[int, int], tmp_path: Path) -> None:
    packed, scale = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    save_file({"a.weight": packed, "a.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    theirs = Fp8Dequantize(None)._dequantize_one(packed, scale, torch.bfloat16)
    found = read(tmp_path, FP8, "a.weight")
    assert found.dtype == torch.bfloat16 and torch.equal(found, theirs.bfloat16())


def test_block_fp8_with_partial_blocks(tmp_path: Path) -> None:
    """transformers refuses these; DeepSeek-V3's own kv_a_proj has 576 rows in blocks of 128."""
    packed, scale = quantize(torch.randn(21, 40, generator=torch.Generator().manual_seed(0)))
    save_file({"a.weight": packed, "a.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    factors = scale.repeat_interleave(16, 0)[:21].repeat_interleave(16, 1)[:, :40]
    assert torch.equal(read(tmp_path, FP8, "a.weight"), (packed.float() * factors).bfloat16())


def test_mxfp4(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 10, 4), generator=generator, dtype=torch.uint8)
    packed = {"experts.gate_up_proj_blocks": blocks, "experts.gate_up_proj_scales": scales, "norm": torch.ones(3)}
    save_file(packed, tmp_path / "model.safetensors")
    with unpacked(MXFP4, open_source(tmp_path))[1] as source:
        assert source.shapes == {"experts.gate_up_proj": (3, 128, 10), "norm": (3,)}
        assert source.dtypes == {"experts.gate_up_proj": "BF16", "norm": "F32"}
        found = source.read("experts.gate_up_proj")
    theirs = convert_moe_packed_tensors(blocks, scales)
    assert torch.equal(found, theirs) and torch.equal(source.read("norm"), torch.ones(3))


def test_a_packed_model_loads_and_is_saved_plain(tmp_path: Path) -> None:
    model = oarsmith.load_model(fp8_model(tmp_path / "packed"))
    assert model.embedding.weight.dtype == torch.bfloat16 and "quantization_config" not in model.config
    oarsmith.save_model(model, tmp_path / "saved")
    convert_directory(tmp_path / "packed", tmp_path / "converted", "hf")
    for folder in ("saved", "converted"):
        config, source = open_model(tmp_path / folder)
        assert "quantization_config" not in config and config["torch_dtype"] == "bfloat16"
        assert set(source.dtypes.values()) == {"BF16"}
    saved, converted = (load_file(tmp_path / folder / "model.safetensors") for folder in ("saved", "converted"))
    assert saved.keys() == converted.keys() and all(torch.equal(saved[name], converted[name]) for name in saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scales_that_are_no_numbers(value: float, tmp_path: Path) -> None:
    packed, scale = quantize(torch.randn(32, 32))
    scale[1, 0] = value
    save_file({"a.weight": packed, "a.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"a.weight_scale_inv: a scale is NaN or infinite"):
        read(tmp_path, FP8, "a.weight")


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    packed, scale = quantize(torch.randn(32, 32))
    packed[3, 4] = float("nan")
    save_file({"a.weight": packed, "a.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"a.weight: a weight is NaN"):
        read(tmp_path, FP8, "a.weight")
    blocks, scales = torch.zeros(1, 2, 2, 16, dtype=torch.uint8), torch.zeros(1, 2, 2, dtype=torch.uint8)
    scales[0, 1, 1] = 255
    save_file({"x_blocks": blocks, "x_scales": scales}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="x_scales: a scale is NaN"):
        read(tmp_path, MXFP4, "x")


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (FP8, {"a.weight": (32, 32), "a.weight_scale_inv": (2, 3)}, r"scales of shape \(2, 3\) do not fit"),
        (FP8, {"a.weight_scale_inv": (2, 2)}, r"do not fit a weight of shape \(\)"),
        (FP8, {"a.weight": (32, 32)}, "without its weight_scale_inv"),
        (MXFP4, {"x_blocks": (1, 2, 2, 16)}, "do not fit scales of shape None"),
        (MXFP4, {"x_blocks": (1, 2, 2, 16), "x_scales": (1, 2, 3)}, r"do not fit scales of shape \(1, 2, 3\)"),
        (MXFP4, {"x_blocks": (2, 2, 16), "x_scales": (2, 2)}, "do not fit"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 1]}}, {}, "weight_block_size"),
    ],
)
def test_what_does_not_fit(
    config: dict[str, Any], tensors: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    kinds = {"weight": torch.float8_e4m3fn, "scale_inv": torch.float32, "_blocks": torch.uint8, "_scales": torch.uint8}
    made = {n: torch.zeros(s).to(next(k for e, k in kinds.items() if n.endswith(e))) for n, s in tensors.items()}
    save_file(made or {"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        unpacked(config, open_source(tmp_path))


def test_other_methods(tmp_path: Path) -> None:
    """A note that the weights were quantized, beside floats, is only a note; codes of an unknown format are refused."""
    config = {"quantization_config": {"quant_method": "hqq"}}
    for tensor in (torch.ones(1), torch.ones(1, dtype=torch.int8)):
        save_file({"a": tensor}, tmp_path / "model.safetensors")
        if tensor.is_floating_point():
            assert unpacked(config, open_source(tmp_path))[0] == {}
        else:
            with pytest.raises(CheckpointError, match="of the format 'hqq' are not read"):
                unpacked(config, open_source(tmp_path))
