"""`oarsmith quantize` under PaddleNLP's names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from oarsmith.config.load import load_config
from oarsmith.config.quantize import QuantizeConfig


def config_of(folder: Path, **keys: object) -> QuantizeConfig:
    path = folder / "config.json"
    path.write_text(json.dumps({"model_name_or_path": "m", "output_dir": "o", **keys}), encoding="utf-8")
    return load_config(QuantizeConfig, path, []).config


def test_a_file_of_c8(tmp_path: Path) -> None:
    found = config_of(
        tmp_path,
        quant_type="a8w8c8",
        do_ptq=True,
        ptq_step=16,
        smooth=True,
        smooth_all_linears=True,
        smooth_piecewise_search=True,
        smooth_k_piece=3,
        smooth_search_piece=True,
        cachekv_quant_method="avg_headwise",
        calibration="quant.json",
    )
    assert (found.scheme, found.smooth, found.calibration_samples) == ("w8a8c8", "piecewise", 16)
    assert found.chosen_algorithm == "rtn"


@pytest.mark.parametrize(
    ("keys", "scheme", "algorithm"),
    [
        ({"quant_type": "weight_only_int4", "do_gptq": True}, "w4a16", "gptq"),
        ({"quant_type": "wint4", "do_awq": True, "do_ptq": True}, "w4a16", "awq"),
        ({"quant_type": "weight_only_int8"}, "w8a16", "rtn"),
        ({"quant_type": "a8w8_fp8"}, "fp8", "gptaq"),
    ],
)
def test_algorithms(tmp_path: Path, keys: dict[str, object], scheme: str, algorithm: str) -> None:
    found = config_of(tmp_path, calibration="t.txt", **keys)
    assert (found.scheme, found.chosen_algorithm) == (scheme, algorithm)


def test_smooth_alone_is_smoothquant(tmp_path: Path) -> None:
    assert config_of(tmp_path, smooth=True).smooth == "smoothquant"
    assert config_of(tmp_path, smooth=False).smooth == "none"
