"""What a config.json may not say, and the message that names it."""

from __future__ import annotations

from typing import Any

import pytest

from oarsmith.errors import ModelError
from oarsmith.models import families

from .variants import GQA

LLAMA = {**GQA, "model_type": "llama"}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_head": 4}


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"model_type": "lama"}, ["unknown architecture: model_type 'lama'", "did you mean 'llama'?", "qwen3"]),
        ({"architectures": ["FooForCausalLM"]}, ["['FooForCausalLM']", "known model types: llama, mistral"]),
        ({}, ["model_type None"]),
        (
            {"model_type": "zz9", "auto_map": {"AutoModelForCausalLM": "evil.Model"}, "architectures": None},
            ["unknown architecture: model_type 'zz9'"],
        ),
        ({**LLAMA, "hidden_size": None}, ["hidden_size must be a positive integer, got None"]),
        ({**LLAMA, "hidden_size": True}, ["hidden_size must be a positive integer, got True"]),
        ({**LLAMA, "num_hidden_layers": "3"}, ["num_hidden_layers must be a positive integer, got '3'"]),
        ({**LLAMA, "vocab_size": 0}, ["vocab_size must be a positive integer, got 0"]),
        ({**LLAMA, "rms_norm_eps": float("nan")}, ["rms_norm_eps must be a finite number"]),
        ({**LLAMA, "attention_bias": "yes"}, ["attention_bias must be true or false, got 'yes'"]),
        ({**LLAMA, "hidden_act": "mish"}, ["unknown activation 'mish' in hidden_act", "silu"]),
        ({**LLAMA, "num_key_value_heads": 3}, ["4 heads cannot be shared by 3 key/value heads"]),
        ({**LLAMA, "num_attention_heads": 5, "num_key_value_heads": 5}, ["hidden_size 32 is not a multiple of 5"]),
        ({**LLAMA, "rope_scaling": {"type": "ntk"}}, ["unknown rope scaling 'ntk'", "linear, dynamic, llama3, yarn"]),
        ({**LLAMA, "rope_scaling": [1, 2]}, ["rope_scaling must be an object"]),
        ({**LLAMA, "rope_scaling": {"type": "linear"}}, ["factor must be a finite number, got None"]),
        ({**LLAMA, "model_type": "qwen2", "layer_types": ["full_attention"]}, ["does not describe 3 layers"]),
        ({**LLAMA, "model_type": "mistral", "layer_types": ["chunked"] * 3}, ["['chunked', 'chunked', 'chunked']"]),
        ({**LLAMA, "model_type": "mistral", "sliding_window": 0}, ["sliding_window must be a positive integer, got 0"]),
        ({**GPT2, "n_head": 5}, ["n_embd 32 is not a multiple of n_head 5"]),
        ({**GPT2, "activation_function": "elu"}, ["unknown activation 'elu' in activation_function"]),
    ],
)
def test_messages(config: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        families.build_spec(config)
    assert str(caught.value).startswith("config.json"), caught.value
    for part in parts:
        assert part in str(caught.value)


def test_architectures_where_the_type_is_missing() -> None:
    config = {key: value for key, value in LLAMA.items() if key != "model_type"}
    assert families.build_spec({**config, "architectures": ["LLaMAForCausalLM"]})[0].name == "llama"


def test_every_family_is_described() -> None:
    types = [name for family in families.known() for name in family.model_types]
    assert len(types) == len(set(types)) and {"llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2"} <= set(types)
    assert all(family.description and family.architectures for family in families.known())
