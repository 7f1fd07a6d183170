"""LoRA adapters between PEFT's layout and PaddleNLP's, against a loop of their own and the merged models."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import oarsmith
from oarsmith.adapters.paddle_layout import paddle_from_peft, peft_from_paddle, read_paddle_adapter_config
from oarsmith.checkpoint.config_file import read_config
from oarsmith.errors import CheckpointError

from .conftest import Adapted, tokens

PREFIX = "base_model.model."


def to_paddle_state(adapter: Path, base: str) -> dict[str, np.ndarray]:
    """PaddleNLP's tensors of a PEFT adapter on a Llama-like model: its names, and the transposes."""
    state = {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        module, _, kind = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        state[f"{base}.{module.removeprefix('model.')}.{kind}"] = tensor.t().contiguous().numpy()
    return state


def paddle_adapter(folder: Path, files: dict[str, dict[str, np.ndarray]], **changes: Any) -> Path:
    folder.mkdir()
    for name, state in files.items():
        with (folder / name).open("wb") as file:
            pickle.dump(state, file, protocol=4)
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "rslora": False, "pissa": False, "merge_weights": False}
    settings |= {"target_modules": [".*q_proj.*"], "tensor_parallel_degree": -1, "scaling": 2.0, "trainable_bias": None}
    (folder / "lora_config.json").write_text(json.dumps({**settings, **changes}))
    return folder


def same_adapter(a: Path, b: Path) -> None:
    mine, theirs = (load_file(path / "adapter_model.safetensors") for path in (a, b))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("rslora", [False, True])
def test_reading_paddle(rslora: bool, adapted: Any, tmp_path: Path) -> None:
    made: Adapted = adapted("llama", r=4, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=rslora)
    theirs = paddle_adapter(
        tmp_path / "paddle",
        {"lora_model_state.pdparams": to_paddle_state(made.path, "llama")},
        rslora=rslora,
        base_model_name_or_path=str(made.base.path),
    )
    peft_from_paddle(theirs, tmp_path / "peft", read_config(made.base.path), base=None)
    same_adapter(made.path, tmp_path / "peft")
    ids = tokens(2, 9)
    with torch.no_grad():
        difference = (oarsmith.load_model(tmp_path / "peft", dtype="fp32")(ids) - made.oracle(ids).logits).abs().max()
    assert difference < 1e-4


def test_ranks(adapted: Any, tmp_path: Path) -> None:
    """Column-parallel layers split B, row-parallel ones A."""
    made: Adapted = adapted("llama", r=4, target_modules=["q_proj", "down_proj"])
    ranks: list[dict[str, np.ndarray]] = [{}, {}]
    for name, value in to_paddle_state(made.path, "llama").items():
        if "q_proj.lora_B" in name:
            pieces = np.split(value, 2, -1)
        elif "down_proj.lora_A" in name:
            pieces = np.split(value, 2, 0)
        else:
            pieces = [value, value]
        for rank, piece in zip(ranks, pieces, strict=True):
            rank[name] = np.ascontiguousarray(piece)
    files = {f"lora_model_state.tp{rank:02}.pdparams": part for rank, part in enumerate(ranks)}
    theirs = paddle_adapter(tmp_path / "paddle", files, tensor_parallel_degree=2)
    peft_from_paddle(theirs, tmp_path / "peft", read_config(made.base.path), base=str(made.base.path))
    same_adapter(made.path, tmp_path / "peft")


@pytest.mark.parametrize("pickled", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_there_and_back(name: str, pickled: bool, adapted: Any, tmp_path: Path) -> None:
    targets = ["c_attn", "c_fc"] if name == "gpt2" else ["q_proj", "o_proj", "up_proj"]
    made: Adapted = adapted(name, r=4, target_modules=targets, fan_in_fan_out=name == "gpt2")
    config = read_config(made.base.path)
    paddle_from_peft(made.path, tmp_path / "paddle", config, base=None, pickled=pickled)
    assert read_paddle_adapter_config(tmp_path / "paddle")["r"] == 4
    file = "lora_model_state.pdparams" if pickled else "peft_model.safetensors"
    assert (tmp_path / "paddle" / file).exists()
    if pickled and name == "llama":
        with (tmp_path / "paddle" / file).open("rb") as opened:
            found = pickle.load(opened)
        expected = to_paddle_state(made.path, "llama")
        assert all(np.array_equal(found[key], value) for key, value in expected.items())
    peft_from_paddle(tmp_path / "paddle", tmp_path / "peft", config, base=None)
    same_adapter(made.path, tmp_path / "peft")
    ids = tokens(2, 9)
    with torch.no_grad():
        difference = (oarsmith.load_model(tmp_path / "peft", dtype="fp32")(ids) - made.oracle(ids).logits).abs().max()
    assert difference < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pissa": True}, "LoRA with pissa cannot be converted"),
        ({"enable_lora_list": [True]}, "enable_lora_list"),
        ({"r": 0}, "r is 0"),
        ({"r": "4"}, "r is '4'"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_paddle_adapter_config(paddle_adapter(tmp_path / "paddle", {}, **changes))


def test_tensors_without_a_place(adapted: Any, tmp_path: Path) -> None:
    made: Adapted = adapted("llama", r=4, target_modules=["q_proj"])
    config = read_config(made.base.path)
    state = to_paddle_state(made.path, "llama")
    odd = paddle_adapter(tmp_path / "a", {"lora_model_state.pdparams": {**state, "llama.x.lora_A": np.ones(2, "f4")}})
    with pytest.raises(CheckpointError, match=r"tensor llama\.x\.lora_A has no place"):
        peft_from_paddle(odd, tmp_path / "out", config, base=None)
    lone = {name: value for name, value in state.items() if "lora_A" in name}
    with pytest.raises(CheckpointError, match=r"no matrix llama.layers.0.self_attn.q_proj.lora_B"):
        folder = paddle_adapter(tmp_path / "b", {"lora_model_state.pdparams": lone})
        peft_from_paddle(folder, tmp_path / "out", config, base=None)
    weights = load_file(made.path / "adapter_model.safetensors")
    save_file({**weights, "x": torch.ones(1)}, made.path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="tensor x has no place"):
        paddle_from_peft(made.path, tmp_path / "out", config, base=None, pickled=True)
    assert not (tmp_path / "out").exists()


def test_ranks_that_differ(adapted: Any, tmp_path: Path) -> None:
    made: Adapted = adapted("llama", r=4, rank_pattern={"q_proj": 2}, target_modules=["q_proj", "v_proj"])
    with pytest.raises(CheckpointError, match="PaddleNLP's LoRA has one of each"):
        paddle_from_peft(made.path, tmp_path / "out", read_config(made.base.path), base=None, pickled=True)
