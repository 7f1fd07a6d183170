"""Prefix tuning beside PEFT's, under packing, in the engine."""

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
from oarsmith.adapters.exact_file import EXACT
from oarsmith.adapters.merge import merge_adapter
from oarsmith.adapters.peft_layout import WEIGHTS, load_adapter_weights
from oarsmith.engine import Engine, Sampling
from oarsmith.errors import CheckpointError, ConfigError
from tiny import TOKENIZER

from .conftest import Adapted, Base, tokens
from .with_parts import (
    answers_as_forward,
    loss_of,
    off_is_base,
    packed_as_alone,
    read,
    saved,
    trained,
    under,
)

FOUR: dict[str, Any] = {"kind": peft.PrefixTuningConfig, "num_virtual_tokens": 4}
OURS: dict[str, Any] = {"adapter_type": "prefix_tuning", "num_prefix_tokens": 6}
PROJECTED = OURS | {"prefix_projection": True, "prefix_projection_hidden_size": 10}


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "mistral"])
@pytest.mark.parametrize("more", [{}, {"prefix_projection": True, "encoder_hidden_size": 10}])
def test_peft_s_prefix(adapted: Callable[..., Adapted], tmp_path: Path, name: str, more: dict[str, Any]) -> None:
    """Positions that are learned, turned, or distances; a window; grouped heads."""
    made, ids = adapted(name, **FOUR, **more), tokens(2, 17)
    model, expected = read(made.base.path, made.path), made.oracle(ids).logits
    assert (expected - made.base.oracle()(ids).logits).abs().max() > 0.05
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-4)
    again = load_file(saved(model, tmp_path / "again", made.base.path) / WEIGHTS)
    assert torch.equal(again["prompt_embeddings"], load_file(made.path / WEIGHTS)["prompt_embeddings"])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("keys", [OURS, PROJECTED])
def test_peft_reads_ours(base: Callable[[str], Base], tmp_path: Path, name: str, keys: dict[str, Any]) -> None:
    """And has the same gradient of the table."""
    own, ids = base(name), tokens(2, 13)
    model = trained(under(own.path, **keys))
    folder = saved(model, tmp_path / "a", own.path)
    oracle = peft.PeftModel.from_pretrained(own.oracle(), folder).eval()
    expected = model(ids)
    torch.testing.assert_close(oracle(ids).logits, expected, rtol=0, atol=1e-4)
    assert (own.oracle()(ids).logits - expected).abs().max() > 0.02
    torch.testing.assert_close(oarsmith.load_model(folder, device="cpu")(ids), expected, rtol=0, atol=1e-5)
    if keys is OURS:
        (table,) = oracle.prompt_encoder.parameters()
        table.requires_grad_(True)
        loss_of(oracle(ids).logits, ids).backward()
        loss_of(expected, ids).backward()
        torch.testing.assert_close(model.parts[0].rows.grad, table.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "mistral"])
@pytest.mark.parametrize("keys", [OURS, PROJECTED])
def test_packed(base: Callable[[str], Base], name: str, keys: dict[str, Any]) -> None:
    packed_as_alone(trained(under(base(name).path, **keys)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "mistral"])
def test_the_engine_answers(base: Callable[[str], Base], name: str) -> None:
    engine = answers_as_forward(trained(under(base(name).path, **OURS), std=1.0))
    scheduler = engine.runner.scheduler
    assert (scheduler.num_preempted > 0 or name == "mistral") and scheduler.num_found > 0
    assert engine.context_length == engine.model.spec.max_positions - 6


def test_guesses_and_logprobs(base: Callable[[str], Base]) -> None:
    model = trained(under(base("llama").path, **OURS), std=1.0)
    answers_as_forward(model, speculative="ngram", max_step_tokens=15)
    ids = tokens(9).tolist()
    (found,) = Engine(model).generate(ids, Sampling(max_new_tokens=2, prompt_logprobs=0, repetition_penalty=1.2))
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0].log_softmax(-1)
    assert found.prompt_logprobs is not None and len(found.prompt_logprobs) == 8
    for place, choice in enumerate(found.prompt_logprobs):
        assert choice.token == ids[place + 1]
        assert choice.logprob == pytest.approx(float(logits[place, choice.token]), abs=1e-4)
    with pytest.raises(ConfigError, match="draft model cannot read the virtual tokens"):
        Engine(model, speculative=oarsmith.load_model(base("llama").path, device="cpu"))


def test_a_saved_one_serves(base: Callable[[str], Base], tmp_path: Path) -> None:
    path = base("llama").path
    folder = saved(trained(under(path, **OURS)), tmp_path / "a", path)
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    engine = Engine(path, adapter=folder, device="cpu", dtype="fp32")
    assert engine.how == "PyTorch (prefix tuning)"
    assert len(engine.generate([[1, 2, 3]], Sampling(max_new_tokens=3, ignore_eos=True))[0].ids) == 3
    with pytest.raises(ConfigError, match="cannot be chosen by single requests"):
        Engine(path, engine.tokenizer, adapters={"one": folder}, device="cpu")
    with pytest.raises(ConfigError, match="prefix tuning cannot be merged"):
        merge_adapter(read(path, folder))


def test_off(base: Callable[[str], Base]) -> None:
    off_is_base(trained(under(base("llama").path, **OURS)), base("llama").path)


def test_dropout(base: Callable[[str], Base]) -> None:
    model = trained(under(base("llama").path, **OURS, prefix_dropout=0.5))
    ids = tokens(1, 9)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_training_goes_on(base: Callable[[str], Base], tmp_path: Path) -> None:
    """An encoder comes back from a file beside PEFT's."""
    path, ids = base("llama").path, tokens(1, 9)
    model = trained(under(path, **PROJECTED))
    folder = saved(model, tmp_path / "a", path)
    again = under(path, **PROJECTED).eval()
    load_adapter_weights(again, folder)
    assert torch.equal(model(ids), again(ids))
    (folder / EXACT).unlink()
    with pytest.raises(CheckpointError, match="the encoder itself"):
        load_adapter_weights(again, folder)


def test_refusals(base: Callable[[str], Base], adapted: Callable[..., Adapted], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave nothing of the model's context of 32"):
        under(base("llama").path, adapter_type="prefix_tuning", num_prefix_tokens=32)
    for name in ("deepseek_v3", "yuan2_2b"):
        config = Path(__file__).parents[1] / "fixtures" / "families" / name / "config.json"
        oarsmith.save_model(oarsmith.new_model(json.loads(config.read_text())), tmp_path / name)
        with pytest.raises(ConfigError, match="prefix tuning cannot be used with this model"):
            under(tmp_path / name, **OURS)
    made = adapted("llama", **FOUR)
    weights, config = made.path / WEIGHTS, made.path / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"num_virtual_tokens": 5}))
    with pytest.raises(CheckpointError, match="has 4 rows, the config speaks of 5"):
        read(made.base.path, made.path)
    config.write_text(json.dumps(settings))
    save_file({"prompt_embeddings": torch.zeros(4, 24)}, weights)
    with pytest.raises(CheckpointError, match="prompt_embeddings has shape"):
        read(made.base.path, made.path)
    save_file({"other": torch.zeros(4, 24)}, weights)
    with pytest.raises(CheckpointError, match="prompt_embeddings is missing"):
        read(made.base.path, made.path)
