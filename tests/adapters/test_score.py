"""A head of scores in an adapter's file, also where it is damaged or put where it does not belong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import oarsmith
from oarsmith import cli
from oarsmith.adapters.linear import attach
from oarsmith.adapters.parts import rewrite_of
from oarsmith.adapters.peft_config import CONFIG
from oarsmith.adapters.peft_layout import WEIGHTS, load_adapter_weights, write_adapter
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.config.load import load_config
from oarsmith.config.sft import SftConfig
from oarsmith.engine import Engine
from oarsmith.errors import OarsmithError
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from tiny import CONFIGS, write_tiny_model

NAME = "base_model.model.score.weight"
ADAPTERS: list[dict[str, Any]] = [
    *({"adapter_type": name} for name in ("lora", "dora", "pissa", "olora", "adalora", "vera", "loha", "lokr", "mora")),
    {"adapter_type": "fourierft", "fourierft_frequencies": 20},
    *({"adapter_type": name} for name in ("ia3", "oft", "boft", "bottleneck", "reft", "prefix_tuning")),
    *({"adapter_type": name} for name in ("prompt_tuning", "p_tuning", "loraga", "lorapro", "moslora")),
    {"adapter_type": "trainable_tokens", "trainable_tokens": ["5", "9"]},
    {"adapter_type": "lora", "trainable_tokens": ["5", "9"]},
    {"adapter_type": "lora", "lora_target_modules": "embed_tokens,q_proj"},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("score") / "llama")


def made(base: Path, folder: Path, **keys: Any) -> Decoder:
    """A reward model of a base under an adapter, and its file."""
    words = ["--model_name_or_path", str(base), "--dataset_name_or_path", "none"]
    for key, value in keys.items():
        words += [f"--{key}", json.dumps(value) if isinstance(value, list) else str(value)]
    config = load_config(SftConfig, None, words).config
    scoring = families.scoring_config(CONFIGS["llama"])
    model = load_decoder(base, dtype=torch.float32, rewrite=rewrite_of(config, base), config=scoring)
    attach(model, 5)
    folder.mkdir()
    write_adapter(model.eval(), folder, base=str(base))
    return model


@torch.no_grad()
@pytest.mark.parametrize("keys", ADAPTERS, ids=lambda keys: "-".join(map(str, keys.values())))
def test_every_adapter_has_it(base: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    model = made(base, tmp_path / "a", **keys)
    assert model.head.weight is not None and model.head.weight.requires_grad
    assert (model.head.weight.shape, model.head.weight.dtype) == ((1, 32), torch.float32)
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(oarsmith.load_model(base, adapter=tmp_path / "a")(ids), model(ids), rtol=0, atol=1e-6)
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])


@pytest.mark.parametrize(
    ("score", "part"),
    [
        (torch.zeros(32), "the head of scores is no matrix"),
        (torch.zeros(0, 32), "the head of scores is no matrix"),
        (torch.zeros(1, 31), "has shape (1, 31), the base model asks for (1, 32)"),
        (torch.zeros(1, 32, dtype=torch.int64), "stored as I64"),
    ],
)
def test_damaged(base: Path, tmp_path: Path, score: torch.Tensor, part: str) -> None:
    made(base, tmp_path / "a", adapter_type="lora")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    save_file({**tensors, NAME: score}, tmp_path / "a" / WEIGHTS)
    with pytest.raises(OarsmithError) as error:
        oarsmith.load_model(base, adapter=tmp_path / "a")
    assert part in str(error.value)


def test_two_scores_are_no_reward(base: Path, tmp_path: Path) -> None:
    made(base, tmp_path / "a", adapter_type="lora")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    save_file({**tensors, NAME: torch.zeros(2, 32)}, tmp_path / "a" / WEIGHTS)
    engine = Engine(base, adapter=tmp_path / "a")
    with pytest.raises(OarsmithError, match="the model gives 2 scores"):
        engine.score([[5, 6, 7]])


def test_out_of_place(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Requests choose no reward model, other heads are refused, and other formats say what they cannot hold."""
    made(base, tmp_path / "a", adapter_type="lora")
    with pytest.raises(OarsmithError, match="a reward model's, with a head of scores"):
        Engine(base, adapters={"judge": tmp_path / "a"})
    with pytest.raises(OarsmithError):
        load_adapter_weights(oarsmith.load_model(base), tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config | {"modules_to_save": ["score", "lm_head"]}))
    with pytest.raises(OarsmithError, match="modules_to_save"):
        oarsmith.load_model(base, adapter=tmp_path / "a")
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    assert cli.main(["convert", str(tmp_path / "a"), str(tmp_path / "p"), "--to", "paddle"]) == cli.EXIT_BAD_INPUT
    assert cli.main(["merge-adapter", str(tmp_path / "a"), str(tmp_path / "m")]) == 0
    capsys.readouterr()
    for words in (
        ["convert", str(tmp_path / "m"), str(tmp_path / "m.gguf"), "--to", "gguf"],
        ["convert", str(tmp_path / "m"), str(tmp_path / "q"), "--to", "paddle"],
        ["export", str(tmp_path / "m"), str(tmp_path / "e")],
    ):
        assert cli.main(words) == cli.EXIT_BAD_INPUT, words
        printed = capsys.readouterr().err
        assert "Traceback" not in printed and "this is a reward model" in printed, printed
    assert cli.main(["convert", str(tmp_path / "m"), str(tmp_path / "b"), "--to", "bin"]) == 0
    ids = [[5, 6, 7]]
    assert Engine(tmp_path / "b").score(ids) == Engine(tmp_path / "m").score(ids)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"num_labels": "x", "id2label": None}, "num_labels 'x'"),
        ({"id2label": {}}, "num_labels 0"),
        ({"num_labels": -1, "id2label": None}, "num_labels -1"),
        ({"num_labels": True, "id2label": None}, "num_labels True"),
        ({"id2label": {"0": "a", "1": "b"}}, "has shape (1, 32), the config asks for (2, 32)"),
        ({"architectures": ["LlamaForCausalLM"]}, "lm_head.weight"),
    ],
)
def test_odd_configs(tmp_path: Path, change: dict[str, Any], part: str) -> None:
    place = write_tiny_model(tmp_path / "r", **families.scoring_config(CONFIGS["llama"]))
    assert oarsmith.load_model(place).spec.head.num_scores == 1
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(OarsmithError) as error:
        oarsmith.load_model(place)
    assert part in str(error.value)
