"""`oarsmith quantize` on tiny models, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import oarsmith
from matrix.rows import ROWS
from oarsmith import cli
from oarsmith.checkpoint.config_file import read_config
from oarsmith.config.load import load_config
from oarsmith.config.quantize import QuantizeConfig
from oarsmith.errors import ConfigError
from oarsmith.jobs.quantize_plan import make_plan
from oarsmith.kernels.coded import NF4
from oarsmith.kernels.encode import encode_blocks
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.init import init_weights
from tiny import write_tiny_model

TEXT = "The boat is old, but it still floats, and the river at dawn is quiet. Five small fish swim under it. "


def text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text(TEXT * 40, encoding="utf-8")
    return path


def quantize(model: Path, out: Path, *words: str) -> int:
    own = ["--calibration_samples", "4", "--calibration_length", "64", "--proof_length", "32", "--proof_samples", "2"]
    return cli.main(["quantize", str(model), str(out), "--measure_speed", "false", "--device", "cpu", *own, *words])


def report_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "quantization.json").read_text(encoding="utf-8"))
    return found


SCHEMES = {
    "w8a16": ("--group_size", "-1"),
    "w4a16": ("--group_size", "16"),
    "w8a8": (),
    "w8a8c8": (),
    "w4a8": ("--group_size", "16"),
    "fp8": (),
    "fp8c8": (),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_writes_a_model_that_loads(tmp_path: Path, scheme: str) -> None:
    model, out = write_tiny_model(tmp_path / "model", vocab_size=1120), tmp_path / "out"
    words = ["--scheme", scheme, "--calibration", str(text(tmp_path)), *SCHEMES[scheme]]
    assert quantize(model, out, *words) == 0
    report = report_of(out)
    assert report["kl"] < {"w4a16": 0.2, "w4a8": 0.2}.get(scheme, 0.03), report
    assert len(report["maps"]) == 14
    assert (out / "quantization.png").stat().st_size > 10_000
    ids = torch.arange(24)[None] * 31 % 1000
    before, after = (oarsmith.load_model(path, dtype="fp32")(ids) for path in (model, out))
    assert (before - after).abs().max() < before.abs().max()
    assert read_config(out)["quantization_config"]["quant_method"] == "compressed-tensors"


ALGORITHMS = {
    "rtn": (),
    "gptq": ("--act_order", "false", "--static_groups", "false"),
    "awq": ("--auto_clip", "true"),
    "hqq": (),
    "autoround": ("--autoround_steps", "3"),
    "gptaq": ("--rotate", "true"),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq", "awq"])
def test_every_algorithm_in_every_layout_of_4_bits(tmp_path: Path, algorithm: str, layout: str) -> None:
    model, out = write_tiny_model(tmp_path / "model"), tmp_path / "out"
    words = ["--algorithm", algorithm, "--layout", layout, "--group_size", "16", *ALGORITHMS[algorithm]]
    assert quantize(model, out, *words, "--calibration", str(text(tmp_path))) == 0
    assert report_of(out)["kl"] < 0.3


@pytest.mark.parametrize("scheme", ["w3a16", "w2a16"])
def test_few_bits(tmp_path: Path, scheme: str) -> None:
    model, out = write_tiny_model(tmp_path / "model", num_key_value_heads=4, intermediate_size=64), tmp_path / "out"
    words = ["--scheme", scheme, "--group_size", "16", "--static_groups", "false", "--calibration", str(text(tmp_path))]
    assert quantize(model, out, *words) == 0
    assert report_of(out)["layout"] == {"w3a16": "gptq_v2", "w2a16": "compressed-tensors"}[scheme]
    assert report_of(out)["kl"] < 3


def test_bits_within_a_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_tiny_model(tmp_path / "model")
    words = ["--budget", "kl=0.01", "--group_size", "16", "--calibration", str(text(tmp_path))]
    assert quantize(model, tmp_path / "out", *words) == 0
    report = report_of(tmp_path / "out")
    assert report["kl"] <= 0.01
    assert "layers: " in capsys.readouterr().out


def test_over_budget_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = write_tiny_model(tmp_path / "model"), tmp_path / "out"
    words = ["--algorithm", "rtn", "--group_size", "16", "--kl_budget", "1e-6", "--calibration", str(text(tmp_path))]
    assert quantize(model, out, *words) == 2
    assert "nothing was written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]
    assert quantize(model, out, *words, "--on_over_budget", "warn") == 0


def test_nf4_is_qloras(tmp_path: Path) -> None:
    model, out = write_tiny_model(tmp_path / "model"), tmp_path / "out"
    assert quantize(model, out, "--scheme", "nf4", "--group_size", "16", "--proof_text", str(text(tmp_path))) == 0
    assert report_of(out)["layout"] == "bitsandbytes"
    weight = oarsmith.load_model(model, dtype="fp32").layers[0].ffn.down.weight
    codes, absmax_OG = encode_blocks(weight.detach(), NF4, 16)
    with safe_open(out / "model.safetensors", "pt") as file:
        name = "model.layers.0.mlp.down_proj.weight"
        assert torch.equal(file.get_tensor(name), codes.view(-1, 1))
        assert torch.equal(file.get_tensor(f"{name}.absmax"), absmax_OG.flatten())


def test_static_scales_of_latents_are_refused(tmp_path: Path) -> None:
    config = dict(ROWS["deepseek_v3"].config)
    model = Decoder(families.build_spec(config)[1], config)
    init_weights(model, 0)
    oarsmith.save_model(model, tmp_path / "model")
    words = [str(tmp_path / "model"), str(tmp_path / "out"), "--scheme", "w8a8c8", "--calibration", "text.txt"]
    with pytest.raises(ConfigError, match="no static scales are found"):
        make_plan(load_config(QuantizeConfig, None, words).config, tmp_path / "model", None)


def test_static_scales_in_paddles_layout(tmp_path: Path) -> None:
    model, out = write_tiny_model(tmp_path / "model"), tmp_path / "out"
    words = ["--scheme", "w8a8c8", "--act_quant", "static", "--layout", "paddle", "--act_quant_method", "avg"]
    words += ["--smooth", "smoothquant", "--smooth_all_linears", "true"]
    assert quantize(model, out, *words, "--calibration", str(text(tmp_path))) == 0
    assert {"weight_scales.json", "act_scales.json", "cachekv_scales.json"} <= {path.name for path in out.iterdir()}
    assert report_of(out)["kl"] < 0.05


def test_shifted_and_on_disk(tmp_path: Path) -> None:
    model, out = write_tiny_model(tmp_path / "model", "gpt2"), tmp_path / "out.gguf"
    words = ["--scheme", "w8a16", "--algorithm", "gptq", "--shift", "true", "--smooth", "smoothquant"]
    assert quantize(model, out, *words, "--calibration_on_disk", "true", "--calibration", str(text(tmp_path))) == 0
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["kl"] < 0.01
