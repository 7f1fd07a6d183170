"""Prefixes in PaddleNLP's layout."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

import oarsmith
from oarsmith.adapters.paddle_layout import is_paddle_adapter, paddle_from_peft, peft_from_paddle
from oarsmith.adapters.peft_layout import WEIGHTS
from oarsmith.checkpoint.config_file import read_config
from oarsmith.errors import CheckpointError

from .conftest import Adapted, Base, tokens

FOUR: dict[str, Any] = {"kind": peft.PrefixTuningConfig, "num_virtual_tokens": 4}
# Of the tiny llama: 2 layers, 2 kv heads of 6 entries.
LAYERS, HEADS, DIM = 2, 2, 6


def theirs(folder: Path, state: dict[str, np.ndarray], **settings: Any) -> Path:
    folder.mkdir()
    with (folder / "prefix_model_state.pdparams").open("wb") as file:
        pickle.dump(state, file, protocol=4)
    (folder / "prefix_config.json").write_text(json.dumps({"num_prefix_tokens": 4} | settings))
    return folder


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_there_and_back(adapted: Callable[..., Adapted], tmp_path: Path, name: str) -> None:
    made = adapted(name, **FOUR)
    config, table = read_config(made.base.path), load_file(made.path / WEIGHTS)["prompt_embeddings"]
    paddle_from_peft(made.path, tmp_path / "paddle", config, base=None, pickled=True)
    with (tmp_path / "paddle" / "prefix_model_state.pdparams").open("rb") as file:
        state = pickle.load(file)
    # The suite's code: first half keys, second half values, each layer by layer.
    halves = np.split(state["0.weight"].reshape(4, 2 * LAYERS, HEADS, DIM).transpose(1, 0, 2, 3), 2)
    for layer in range(LAYERS):
        for kind, half in enumerate(halves):
            expected = table.view(4, LAYERS, 2, HEADS, DIM)[:, layer, kind]
            assert np.array_equal(half[layer], expected.numpy())
    settings = json.loads((tmp_path / "paddle" / "prefix_config.json").read_text())
    assert settings["hidden_size"] // settings["num_attention_heads"] == DIM
    assert (settings["multi_query_group_num"], settings["num_prefix_tokens"]) == (HEADS, 4)
    assert is_paddle_adapter(tmp_path / "paddle")
    peft_from_paddle(tmp_path / "paddle", tmp_path / "back", config, base=str(made.base.path))
    assert torch.equal(load_file(tmp_path / "back" / WEIGHTS)["prompt_embeddings"], table)
    ids = tokens(1, 9)
    with torch.no_grad():
        difference = oarsmith.load_model(tmp_path / "back")(ids) - made.oracle(ids).logits
    assert difference.abs().max() < 1e-4


def test_a_network_is_folded(base: Callable[[str], Base], tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    inner, width = HEADS * DIM, 2 * LAYERS * HEADS * DIM
    shapes = {
        "0.weight": (4, inner),
        "1.weight": (inner, 5),
        "1.bias": (5,),
        "3.weight": (5, width),
        "3.bias": (width,),
    }
    state = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    folder = theirs(tmp_path / "paddle", state, prefix_projection=True)
    peft_from_paddle(folder, tmp_path / "peft", read_config(base("llama").path), base=str(base("llama").path))
    found = load_file(tmp_path / "peft" / WEIGHTS)["prompt_embeddings"].view(4, LAYERS, 2, -1)
    made = np.tanh(state["0.weight"] @ state["1.weight"] + state["1.bias"]) @ state["3.weight"] + state["3.bias"]
    np.testing.assert_allclose(found.transpose(1, 2).numpy(), made.reshape(4, 2, LAYERS, -1), rtol=1e-5, atol=1e-5)
    assert oarsmith.load_model(tmp_path / "peft")(tokens(1, 5)).isfinite().all()


def test_refusals(base: Callable[[str], Base], tmp_path: Path) -> None:
    config = read_config(base("llama").path)
    for at, (state, settings, part) in enumerate(
        (
            ({"1.weight": np.zeros((4, 48), np.float32)}, {}, "tensor 0.weight is missing"),
            ({"0.weight": np.zeros((4, 47), np.float32)}, {}, "the base model asks for"),
            ({"0.weight": np.zeros((4, 48), np.float32)}, {"num_prefix_tokens": "4"}, "num_prefix_tokens is '4'"),
        )
    ):
        folder = theirs(tmp_path / str(at), state, **settings)
        with pytest.raises(CheckpointError, match=part):
            peft_from_paddle(folder, tmp_path / "peft", config, base="base")
    with pytest.raises(CheckpointError, match="prefixes of bloom mean something else"):
        peft_from_paddle(tmp_path / "1", tmp_path / "peft", read_config(base("bloom").path), base="base")
