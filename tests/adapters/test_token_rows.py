"""Rows of the embedding that train, alone and beside LoRA, as PEFT has them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import oarsmith
from oarsmith.adapters.merge import merge_adapter
from oarsmith.adapters.peft_layout import WEIGHTS
from oarsmith.engine import Engine
from oarsmith.errors import CheckpointError, ConfigError
from oarsmith.text import load_tokenizer
from tiny import TOKENIZER

from .conftest import Adapted, Base, tokens
from .with_parts import answers_as_forward, loss_of, off_is_base, packed_as_alone, read, saved, trained, under

IDS = tokens(2, 17)
HELD = sorted({int(index) for index in IDS[0, :5]})
OURS: dict[str, Any] = {"adapter_type": "trainable_tokens", "trainable_tokens": HELD}
BESIDE: dict[str, Any] = {"adapter_type": "lora", "lora_rank": 3, "trainable_tokens": HELD}
# gpt2, bloom and mistral have tied heads.
NAMES = ["llama", "gpt2", "bloom", "mistral"]
PEFT_S: dict[str, dict[str, Any]] = {
    "alone": {"kind": peft.TrainableTokensConfig, "token_indices": HELD},
    "beside": {"r": 2, "target_modules": "all-linear", "trainable_token_indices": HELD},
}


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", PEFT_S)
def test_peft_s(adapted: Callable[..., Adapted], tmp_path: Path, name: str, kind: str) -> None:
    made = adapted(name, **PEFT_S[kind])
    model, expected = read(made.base.path, made.path), made.oracle(IDS).logits
    assert (expected - made.base.oracle()(IDS).logits).abs().max() > 0.05
    torch.testing.assert_close(model(IDS), expected, rtol=0, atol=1e-4)
    again, stored = (load_file(f / WEIGHTS) for f in (saved(model, tmp_path / "a", made.base.path), made.path))
    assert again.keys() == stored.keys() and all(torch.equal(again[key], stored[key]) for key in stored)
    plain = merge_adapter(model)
    torch.testing.assert_close(plain(IDS), expected, rtol=0, atol=1e-4)
    oarsmith.save_model(plain, tmp_path / "merged")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keys", [OURS, BESIDE])
def test_peft_reads_ours(base: Callable[[str], Base], tmp_path: Path, name: str, keys: dict[str, Any]) -> None:
    """And has the same gradients, of a tied head too."""
    own = base(name)
    model = trained(under(own.path, **keys))
    folder = saved(model, tmp_path / "a", own.path)
    oracle = peft.PeftModel.from_pretrained(own.oracle(), folder, is_trainable=True).eval()
    expected, found = model(IDS), oracle(IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    loss_of(found, IDS).backward()
    loss_of(expected, IDS).backward()
    (theirs,) = [p.grad for n, p in oracle.named_parameters() if "trainable_tokens_delta" in n]
    torch.testing.assert_close(model.parts[0].rows.grad, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_start(base: Callable[[str], Base], name: str) -> None:
    """It is the base, bit for bit; only rows train."""
    model = under(base(name).path, **OURS)
    assert torch.equal(model.eval()(IDS), oarsmith.load_model(base(name).path, device="cpu")(IDS))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["parts.0.rows"]
    off_is_base(trained(model), base(name).path)


def test_packed_and_served(base: Callable[[str], Base], tmp_path: Path) -> None:
    model = trained(under(base("mistral").path, **OURS))
    packed_as_alone(model)
    answers_as_forward(model)
    path = base("llama").path
    folder = saved(trained(under(path, **OURS)), tmp_path / "a", path)
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    engine = Engine(path, adapter=folder, device="cpu", dtype="fp32")
    assert engine.how.startswith("compiled step"), "a merged table needs nothing of PyTorch"


def test_tokens_by_name(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 1120,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    oarsmith.save_model(oarsmith.new_model(config), tmp_path / "base")
    shutil.copytree(TOKENIZER, tmp_path / "base", dirs_exist_ok=True)
    token = load_tokenizer(TOKENIZER).id_to_token(300)
    model = under(tmp_path / "base", adapter_type="trainable_tokens", trainable_tokens=[7, token, 7])
    assert model.parts[0].spec.ids == (7, 300)
    for name in ("1120", "no such token"):
        with pytest.raises(ConfigError, match="is no token of this model"):
            under(tmp_path / "base", adapter_type="trainable_tokens", trainable_tokens=[name])


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"token_indices": [3, 61]}, "outside the model's vocabulary of 61"),
        ({"token_indices": [3, 3]}, "no list of different token ids"),
        ({"token_indices": []}, "no list of different token ids"),
        ({"token_indices": {"lm_head": [3]}}, "rows of other parts than the embedding"),
    ],
)
def test_damaged(adapted: Callable[..., Adapted], changes: dict[str, Any], part: str) -> None:
    made = adapted("llama", **PEFT_S["alone"])
    config = made.path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(CheckpointError, match=part):
        read(made.base.path, made.path)


def test_other_rows(adapted: Callable[..., Adapted]) -> None:
    made = adapted("llama", **PEFT_S["alone"])
    (name,) = load_file(made.path / WEIGHTS)
    save_file({name: torch.zeros(1, 24)}, made.path / WEIGHTS)
    with pytest.raises(CheckpointError, match=f"{name} has shape"):
        read(made.base.path, made.path)
    save_file({name.replace("embed_tokens", "lm_head"): torch.zeros(1, 24)}, made.path / WEIGHTS)
    with pytest.raises(CheckpointError, match="rows of other parts"):
        read(made.base.path, made.path)


def test_a_tied_head_s_rows(adapted: Callable[..., Adapted]) -> None:
    """PEFT writes them twice."""
    made = adapted("mistral", **PEFT_S["alone"])
    stored = load_file(made.path / WEIGHTS)
    (again,) = [name for name in stored if "lm_head" in name]
    save_file({**stored, again: stored[again] + 1}, made.path / WEIGHTS)
    with pytest.raises(CheckpointError, match="differ from those of the embedding"):
        read(made.base.path, made.path)
