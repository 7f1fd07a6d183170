"""Prompt tuning and P-tuning beside PEFT's, under packing, in the engine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import oarsmith
from oarsmith.adapters.exact_file import EXACT
from oarsmith.adapters.merge import merge_adapter
from oarsmith.adapters.peft_layout import WEIGHTS, load_adapter_weights
from oarsmith.errors import CheckpointError, ConfigError
from oarsmith.text import load_tokenizer
from tiny import TOKENIZER

from .conftest import Adapted, Base, tokens
from .with_parts import answers_as_forward, loss_of, off_is_base, packed_as_alone, read, saved, trained, under

OURS: dict[str, Any] = {"adapter_type": "prompt_tuning", "num_prompt_tokens": 6}
MLP: dict[str, Any] = {"adapter_type": "p_tuning", "num_prompt_tokens": 3, "p_tuning_hidden_size": 7}
LSTM = MLP | {"p_tuning_encoder": "lstm"}
PEFT_S: dict[str, dict[str, Any]] = {
    "prompt": {"kind": peft.PromptTuningConfig},
    "mlp": {"kind": peft.PromptEncoderConfig, "encoder_hidden_size": 9},
    "lstm": {
        "kind": peft.PromptEncoderConfig,
        "encoder_hidden_size": 9,
        "encoder_reparameterization_type": "LSTM",
        "encoder_num_layers": 1,
    },
}


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "mistral"])
@pytest.mark.parametrize("kind", PEFT_S)
def test_peft_s(adapted: Callable[..., Adapted], tmp_path: Path, name: str, kind: str) -> None:
    made, ids = adapted(name, num_virtual_tokens=4, **PEFT_S[kind]), tokens(2, 17)
    model, expected = read(made.base.path, made.path), made.oracle(ids).logits[:, 4:]
    assert (expected - made.base.oracle()(ids).logits).abs().max() > 0.05
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-4)
    again = load_file(saved(model, tmp_path / "again", made.base.path) / WEIGHTS)
    assert torch.equal(again["prompt_embeddings"], load_file(made.path / WEIGHTS)["prompt_embeddings"])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("keys", [OURS, MLP, LSTM])
def test_peft_reads_ours(base: Callable[[str], Base], tmp_path: Path, name: str, keys: dict[str, Any]) -> None:
    """And has the same gradient of the vectors."""
    own, ids, count = base(name), tokens(2, 13), keys["num_prompt_tokens"]
    model = trained(under(own.path, **keys))
    folder = saved(model, tmp_path / "a", own.path)
    oracle = peft.PeftModel.from_pretrained(own.oracle(), folder).eval()
    expected = model(ids)
    torch.testing.assert_close(oracle(ids).logits[:, count:], expected, rtol=0, atol=1e-4)
    assert (own.oracle()(ids).logits - expected).abs().max() > 0.02
    torch.testing.assert_close(oarsmith.load_model(folder, device="cpu")(ids), expected, rtol=0, atol=1e-5)
    if keys is OURS:
        (table,) = oracle.prompt_encoder.parameters()
        table.requires_grad_(True)
        loss_of(oracle(ids).logits[:, count:], ids).backward()
        loss_of(expected, ids).backward()
        torch.testing.assert_close(model.parts[0].rows.grad, table.grad, rtol=1e-3, atol=1e-6)


def test_a_scaled_table(tmp_path: Path) -> None:
    """Gemma's rows are scaled before the vectors come."""
    config = {
        "model_type": "gemma",
        "architectures": ["GemmaForCausalLM"],
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "max_position_embeddings": 32,
    }
    oarsmith.save_model(oarsmith.new_model(config), tmp_path / "gemma")
    own, ids = Base("gemma", tmp_path / "gemma"), tokens(1, 9)
    model = trained(under(own.path, **OURS))
    oracle = peft.PeftModel.from_pretrained(own.oracle(), saved(model, tmp_path / "a", own.path)).eval()
    torch.testing.assert_close(oracle(ids).logits[:, 6:], model(ids), rtol=0, atol=1e-5)
    fresh = under(own.path, **OURS)
    table = fresh.embedding.weight * 24**0.5
    for row in fresh.parts[0].rows:
        assert (table - row).abs().amax(1).min() < 1e-6


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "mistral"])
@pytest.mark.parametrize("keys", [OURS, MLP, LSTM])
def test_packed(base: Callable[[str], Base], name: str, keys: dict[str, Any]) -> None:
    packed_as_alone(trained(under(base(name).path, **keys)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "mistral"])
def test_the_engine_answers(base: Callable[[str], Base], name: str) -> None:
    engine = answers_as_forward(trained(under(base(name).path, **OURS), std=1.0))
    assert engine.runner.scheduler.num_found > 0
    answers_as_forward(trained(under(base(name).path, **MLP), std=1.0))


def test_off(base: Callable[[str], Base]) -> None:
    off_is_base(trained(under(base("llama").path, **OURS)), base("llama").path)
    with pytest.raises(ConfigError, match="prompt tuning cannot be merged"):
        merge_adapter(under(base("llama").path, **OURS))


def test_starts(tmp_path: Path) -> None:
    """A text's rows, as often as they fit; another seed's rows are others."""
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
    ids = load_tokenizer(TOKENIZER).encode("Say yes")
    for count in (2, 3 * len(ids) - 1):
        model = under(tmp_path / "base", **OURS | {"num_prompt_tokens": count}, prompt_tuning_init_text="Say yes")
        assert torch.equal(model.parts[0].rows, model.embedding.weight[(ids * 3)[:count]])
    model = under(tmp_path / "base", **OURS, prompt_tuning_init="random")
    assert 0.5 < float(model.parts[0].rows.std() / model.embedding.weight.std()) < 2
    with pytest.raises(ConfigError, match="no tokens"):
        under(tmp_path / "base", **OURS, prompt_tuning_init_text="")


@pytest.mark.parametrize("keys", [MLP, LSTM])
def test_training_goes_on(base: Callable[[str], Base], tmp_path: Path, keys: dict[str, Any]) -> None:
    path, ids = base("llama").path, tokens(1, 9)
    model = trained(under(path, **keys))
    folder = saved(model, tmp_path / "a", path)
    again = under(path, **keys).eval()
    load_adapter_weights(again, folder)
    assert torch.equal(model(ids), again(ids))
    (folder / EXACT).unlink()
    with pytest.raises(CheckpointError, match="the encoder itself"):
        load_adapter_weights(again, folder)


def test_damaged(adapted: Callable[..., Adapted]) -> None:
    made = adapted("llama", num_virtual_tokens=4, **PEFT_S["prompt"])
    save_file({"prompt_embeddings": torch.zeros(4, 23)}, made.path / WEIGHTS)
    with pytest.raises(CheckpointError, match="prompt_embeddings has shape"):
        read(made.base.path, made.path)
