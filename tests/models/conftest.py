"""Tiny random models written by transformers, the oracle, and read by us."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from oarsmith.checkpoint.hf import load_decoder
from oarsmith.models.decoder import Decoder

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = {**SIZES, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 101, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1}


def rope(kind: str, **values: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **values}}


# name -> (config class, its arguments). Contexts of 16 are exceeded by the tests' 40 tokens.
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, SIZES),
    "llama_gqa_head_dim": (transformers.LlamaConfig, {**GQA, "head_dim": 12, "rms_norm_eps": 1e-3}),
    "llama_bias_tied": (
        transformers.LlamaConfig,
        {**GQA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama_gelu": (transformers.LlamaConfig, {**GQA, "hidden_act": "gelu"}),
    "llama_linear": (transformers.LlamaConfig, {**GQA, **rope("linear", factor=4.0)}),
    "llama_dynamic": (
        transformers.LlamaConfig,
        {**GQA, "max_position_embeddings": 16, **rope("dynamic", factor=2.0)},
    ),
    "llama_llama3": (
        transformers.LlamaConfig,
        {
            **GQA,
            "head_dim": 16,
            **rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
        },
    ),
    "llama_yarn": (
        transformers.LlamaConfig,
        {**GQA, "head_dim": 16, **rope("yarn", factor=4.0, original_max_position_embeddings=16)},
    ),
    "llama_yarn_all": (
        transformers.LlamaConfig,
        {
            **GQA,
            **rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=16,
                beta_fast=8.0,
                beta_slow=2.0,
                mscale=0.7,
                mscale_all_dim=1.2,
                truncate=False,
            ),
        },
    ),
    "mistral": (transformers.MistralConfig, {**GQA, "sliding_window": 7}),
    "mistral_full": (transformers.MistralConfig, {**GQA, "sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, GQA),
    "qwen2_sliding": (
        transformers.Qwen2Config,
        {**GQA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "tie_word_embeddings": True},
    ),
    "qwen3": (transformers.Qwen3Config, {**GQA, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_bias": (transformers.Qwen3Config, {**GQA, "head_dim": 8, "attention_bias": True}),
    "gemma": (transformers.GemmaConfig, {**GQA, "head_dim": 12}),
    "gpt2": (transformers.GPT2Config, GPT2),
    "gpt2_inverse": (
        transformers.GPT2Config,
        {**GPT2, "scale_attn_by_inverse_layer_idx": True, "n_inner": 50, "tie_word_embeddings": False},
    ),
    "gpt2_unscaled": (
        transformers.GPT2Config,
        {**GPT2, "scale_attn_weights": False, "activation_function": "relu"},
    ),
}
BOTH_SPELLINGS = [name for name, (_, arguments) in VARIANTS.items() if "n_embd" not in arguments]


@dataclass(frozen=True)
class Case:
    """A model on disk with its oracle."""

    name: str
    path: Path

    def oracle(self) -> Any:
        """A fresh transformers model in fp32 (dynamic rope keeps state between calls)."""
        return transformers.AutoModelForCausalLM.from_pretrained(
            self.path, attn_implementation="eager", dtype=torch.float32
        ).eval()

    def decoder(self) -> Decoder:
        return load_decoder(self.path).eval()


@torch.no_grad()
def randomise(model: Any, seed: int) -> None:
    """Every weight random, biases and norms too: what is zero or one at the start would hide a missing term."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
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
    old["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    old["torch_dtype"] = config.get("dtype", "float32")
    return old


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
