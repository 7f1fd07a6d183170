"""Tiny bases and adapters made by PEFT, the oracle, and read by us."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import oarsmith

VOCAB_SIZE = 61
BASES: dict[str, Any] = {
    "llama": transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        attention_bias=True,
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=24, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2
    ),
    "bloom": transformers.BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=24, n_layer=2, n_head=3),
    "mistral": transformers.MistralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        sliding_window=6,
        tie_word_embeddings=True,
    ),
}

MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "torch_dtype": "float32",
}


@dataclass(frozen=True)
class Base:
    name: str
    path: Path

    def oracle(self) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            self.path, attn_implementation="eager", dtype=torch.float32
        ).eval()


@torch.no_grad()
def randomise(parameters: Any, seed: int, std: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_(std * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    made: dict[str, Base] = {}

    def make(name: str) -> Base:
        if name not in made:
            torch.manual_seed(3)
            model = transformers.AutoModelForCausalLM.from_config(BASES[name])
            randomise(model.parameters(), seed=4, std=0.2)
            path = tmp_path_factory.mktemp("base") / name
            model.save_pretrained(path)
            made[name] = Base(name, path)
        return made[name]

    return make


def mixtral(folder: Path) -> Path:
    """A small model with experts."""
    if not folder.exists():
        oarsmith.save_model(oarsmith.new_model(MIXTRAL, seed=1), folder)
    return folder


@pytest.fixture
def base_of(base: Callable[[str], Base], tmp_path: Path) -> Callable[[str], Path]:
    """The path of a base, or of a small model with experts."""
    return lambda name: mixtral(tmp_path / "mixtral") if name == "mixtral" else base(name).path


@dataclass(frozen=True)
class Adapted:
    """A base with an adapter on disk, and the PEFT model it came from."""

    base: Base
    path: Path
    oracle: Any


@pytest.fixture
def adapted(base: Callable[[str], Base], tmp_path: Path) -> Callable[..., Adapted]:
    """adapted("llama", r=4, ...): both A and B (and trained biases) random, saved by PEFT; ``kind``: another method."""

    def make(name: str, *, kind: Callable[..., Any] = peft.LoraConfig, **arguments: Any) -> Adapted:
        made = base(name)
        config = kind(task_type="CAUSAL_LM", **arguments)
        torch.manual_seed(8)
        oracle = peft.get_peft_model(made.oracle(), config).eval()
        randomise((p for _, p in sorted(oracle.named_parameters()) if p.requires_grad), seed=9, std=0.15)
        path = tmp_path / "adapter"
        oracle.save_pretrained(path)
        return Adapted(made, path, oracle)

    return make


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> Iterator[None]:
    """Every test here runs tiny models."""
    return


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))
