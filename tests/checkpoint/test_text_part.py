"""Gemma 3's image and text checkpoints: the language model inside is read, trained and written as a text model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from oarsmith.checkpoint.hf import load_decoder, write_decoder
from oarsmith.errors import CheckpointError, ModelError
from oarsmith.models import families


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny image and text model with random weights, as transformers writes it."""
    text = transformers.Gemma3TextConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        sliding_window=6,
        pad_token_id=0,
        eos_token_id=2,
    )
    vision = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=100, eos_token_id=[2, 7]
    )
    model, generator = transformers.Gemma3ForConditionalGeneration(config), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    path = tmp_path_factory.mktemp("whole") / "gemma3"
    model.save_pretrained(path)
    return path


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    found = model.eval()(ids)
    return found if isinstance(found, torch.Tensor) else found.logits


IDS = torch.randint(0, 99, (2, 24), generator=torch.Generator().manual_seed(1))


def test_the_text_part_alone(whole: Path, tmp_path: Path) -> None:
    expected = logits(transformers.Gemma3ForConditionalGeneration.from_pretrained(whole), IDS)
    model = load_decoder(whole)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(model, IDS), expected, rtol=0, atol=1e-4)
    write_decoder(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "gemma3_text" and config["eos_token_id"] == [2, 7]
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "model.layers.6.self_attn.q_norm.weight" in names and not any("vision" in name for name in names)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, transformers.Gemma3ForCausalLM)
    torch.testing.assert_close(logits(again, IDS), expected, rtol=0, atol=1e-4)


def test_names_as_they_are_in_memory(whole: Path, tmp_path: Path) -> None:
    """Some tools write the module paths of transformers 5."""
    (tmp_path / "config.json").write_text((whole / "config.json").read_text())
    tensors = load_file(whole / "model.safetensors")
    inside = "language_model.model."
    renamed = {
        f"model.language_model.{name.removeprefix(inside)}" if name.startswith(inside) else f"model.{name}": tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, tmp_path / "model.safetensors")
    assert torch.equal(logits(load_decoder(tmp_path), IDS), logits(load_decoder(whole), IDS))


def test_what_is_neither_text_nor_vision_is_named(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((whole / "config.json").read_text())
    tensors = load_file(whole / "model.safetensors")
    save_file({**tensors, "audio_tower.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"audio_tower\.weight"):
        load_decoder(tmp_path)


def test_a_sparse_config_means_the_defaults() -> None:
    """The released 4B states six keys of its text part."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    text |= {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    config = {"model_type": "gemma3", "text_config": text, "torch_dtype": "bfloat16"}
    found = families.build_spec(families.text_config(config))[1]
    assert found == families.build_spec(transformers.Gemma3TextConfig(**text).to_dict())[1]
    assert found.vocab_size == 262208 and found.layers[0].attention.window == 1024


def test_other_models_with_a_text_part_are_unknown() -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    assert families.text_config(config) == config
    with pytest.raises(ModelError, match="unknown architecture: model_type 'llava'"):
        families.build_spec(families.text_config(config))
