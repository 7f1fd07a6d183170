"""Tiny random models of several families, read by us and by transformers from the same directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import oarsmith
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.init import init_weights

# A deviation far above real ones: answers then vary instead of repeating one token, and no two logits are nearly equal.
_STD = 0.3
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 199,
    "max_position_embeddings": 64,
    "initializer_range": _STD,
    "torch_dtype": "float32",
}
CONFIGS = {
    "llama": {**_LLAMA, "model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "gemma": {**_LLAMA, "model_type": "gemma", "architectures": ["GemmaForCausalLM"], "head_dim": 16},
    # Shorter than prompt and answer together, so that the window moves during decoding.
    "mistral": {**_LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 7},
    # Shorter than prompt and answer together, so that the rotation changes during decoding.
    "phi3_long": {
        **_LLAMA,
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "pad_token_id": 0,
        "original_max_position_embeddings": 16,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.5], "long_factor": [1.5, 2, 5, 9]},
    },
    "gpt2": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 64,
        "vocab_size": 199,
        "initializer_range": _STD,
        "torch_dtype": "float32",
    },
}


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Every test here runs tiny models."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_model(name of CONFIGS) -> its directory, with random weights."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            model = Decoder(families.build_spec(CONFIGS[name])[1], CONFIGS[name])
            init_weights(model, seed=3)
            made[name] = tmp_path_factory.mktemp("tiny") / name
            oarsmith.save_model(model, made[name])
        return made[name]

    return make
