"""Tiny random models written by transformers, the oracle, and read by us."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from oarsmith.checkpoint.hf import load_decoder
from oarsmith.models.decoder import Decoder

from .variants import beyond_llama, experts, latent_and_sinks, llama_line, older

# name -> (config class, its arguments)
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    **llama_line.VARIANTS,
    **older.VARIANTS,
    **latent_and_sinks.VARIANTS,
    **experts.VARIANTS,
    **beyond_llama.VARIANTS,
}
# All that have rope, but for layer types no older key can say.
BOTH_SPELLINGS = [
    name
    for name, (kind, arguments) in VARIANTS.items()
    if "layer_types" not in arguments and kind(**arguments).to_dict().get("rope_parameters")
]


@dataclass(frozen=True)
class Case:
    """A model on disk with its oracle."""

    name: str
    path: Path

    def oracle(self) -> Any:
        """A fresh transformers model in fp32 (dynamic rope keeps state between calls).

        Falcon's eager path adds the ALiBi penalty twice; its sdpa path does what the authors' code does.
        """
        config = read_json(self.path / "config.json")
        way = "sdpa" if config["model_type"] == "falcon" and config["alibi"] else "eager"
        return transformers.AutoModelForCausalLM.from_pretrained(
            self.path, attn_implementation=way, dtype=torch.float32
        ).eval()

    def decoder(self) -> Decoder:
        return load_decoder(self.path).eval()


@torch.no_grad()
def randomise(model: Any, seed: int) -> None:
    """Every weight random, biases and norms too: what is zero or one at the start would hide a missing term."""
    generator = torch.Generator().manual_seed(seed)
    stored = [item for item in model.named_buffers() if item[0].endswith("e_score_correction_bias")]
    for name, parameter in sorted([*model.named_parameters(), *stored]):
        centre = 1.0 if "norm" in name.lower() or ".ln_" in name else 0.0
        parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """case(name of VARIANTS): made once a session."""
    made: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in made:
            kind, arguments = VARIANTS[name]
            model = transformers.AutoModelForCausalLM.from_config(kind(**arguments))
            randomise(model, seed=7)
            path = tmp_path_factory.mktemp("oracle") / name
            model.save_pretrained(path)
            made[name] = Case(name, path)
        return made[name]

    return make


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> Iterator[None]:
    """Every test here runs tiny models."""
    return


def tokens(*shape: int, vocab: int = 101, seed: int = 1) -> Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def old_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """A transformers 5 ``config.json`` as transformers 4.3x wrote it."""
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "layer_types", "dtype")}
    rope = dict(config["rope_parameters"])
    if "sliding_attention" in rope:  # Gemma 3: scaling was for the full layers alone
        assert rope["sliding_attention"]["rope_type"] == "default"
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    old["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    old["torch_dtype"] = config.get("dtype", "float32")
    return old


@torch.no_grad()
def gradients_in_file_layout(oracle: Any, folder: Path) -> dict[str, Tensor]:
    """File name -> gradient in the file's shape: transformers stacks experts in memory and splits them on saving."""
    copy = deepcopy(oracle)
    for name, parameter in copy.named_parameters():
        grad = oracle.get_parameter(name).grad
        assert grad is not None, name
        parameter.copy_(grad)
    copy.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
