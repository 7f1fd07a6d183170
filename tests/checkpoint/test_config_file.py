"""``config.json`` before anything is built from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from oarsmith.checkpoint.config_file import read_config
from oarsmith.checkpoint.fill import meta_decoder
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.errors import CheckpointError, OarsmithError
from oarsmith.models import families
from tiny import write_tiny_model

FAMILIES = sorted((Path(__file__).parents[1] / "fixtures" / "families").iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers: a number of absurd size"),
        ({"num_experts": 10**9}, "num_experts: a number of absurd size"),
        ({"anything": 10**400}, "anything: a number of absurd size"),
        ({"rope_scaling": {"factor": 10**400}}, "rope_scaling: factor: a number of absurd size"),
        ({"hidden_act": ["silu"]}, "hidden_act: .* is not a text"),
        ({"architectures": 3}, "architectures: 3 is not a list of names"),
        ({"layer_types": [1]}, r"layer_types: \[1\] is not a list of names"),
    ],
)
def test_absurd_values(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **changes}))
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def test_large_numbers_that_occur(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "model_max_length": int(1e30)}))
    assert read_config(tmp_path)["model_max_length"] == int(1e30)


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"a": 1, "a": 2}', "[" * 100_000, "\xff"])
def test_damaged_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"JSON|config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size"])
@pytest.mark.parametrize("value", [2**20 + 32, 2**31, 2**62, 2**100])
def test_a_config_cannot_ask_for_memory(key: str, value: int, tmp_path: Path) -> None:
    """Sizes are compared with the files before a byte is allocated: these models would have up to 10^40 parameters."""
    folder = write_tiny_model(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(OarsmithError, match=r"the config asks for|absurd|divisible"):
        load_decoder(folder)


@pytest.mark.parametrize("folder", FAMILIES, ids=lambda path: path.name)
def test_every_key_with_other_values(folder: Path, tmp_path: Path) -> None:
    """Only errors of ours, whatever a config says."""
    target = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for key in config:
        for value in (10**12, -1, 0, "x", None, [], 1.5, {}):
            (target / "config.json").write_text(json.dumps({**config, key: value}))
            try:
                families.build_spec(read_config(target))
            except OarsmithError:
                continue


def test_parameters_with_a_dtype_of_their_own() -> None:
    folder = next(path for path in FAMILIES if path.name == "deepseek_v3")
    config = read_config(folder)
    model = meta_decoder(families.build_spec(config)[1], config, torch.bfloat16)
    kinds = {parameter.dtype for parameter in model.parameters()}
    assert kinds == {torch.bfloat16, torch.float32} and torch.get_default_dtype() == torch.float32
    assert all(parameter.is_meta for parameter in model.parameters())
