"""What a config.json may not say, and the message that names it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import transformers

from oarsmith.errors import ModelError
from oarsmith.models import families
from oarsmith.models.spec_position import LongScaling, Rope, YarnScaling

from .conftest import VARIANTS
from .variants import GQA, SIZES, experts

LLAMA = {**GQA, "model_type": "llama"}
MOE = {**experts.QWEN2, "model_type": "qwen2_moe"}
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
        ({**MOE, "num_experts_per_tok": 7}, ["num_experts_per_tok 7 is more than the 6 experts"]),
        ({**MOE, "mlp_only_layers": 1}, ["mlp_only_layers must be a list of integers, got 1"]),
        ({**LLAMA, "model_type": "smollm3", "no_rope_layers": [1, 0]}, ["0 or 1 for each of 3 layers, got [1, 0]"]),
        ({**LLAMA, "model_type": "smollm3", "no_rope_layers": [1, 0, 2]}, ["0 or 1 for each", "[1, 0, 2]"]),
        ({**LLAMA, "model_type": "gemma2", "use_bidirectional_attention": True}, ["this is an encoder"]),
        (
            {**LLAMA, "model_type": "gemma2", "final_logit_softcapping": 0},
            ["final_logit_softcapping must be above zero"],
        ),
        ({**LLAMA, "model_type": "granite", "logits_scaling": -1.0}, ["logits_scaling must be above zero, got -1"]),
        ({**LLAMA, "model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, ["Gemma 3 does not have", "null"]),
        (
            {**LLAMA, "model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [2]}},
            ["short_factor must hold 4 positive numbers, one for each frequency, got 1"],
        ),
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
    names = [family.name for family in families.known()]
    types = [name for family in families.known() for name in family.model_types]
    shared = {"chatglm", "falcon", "RefinedWeb", "RefinedWebModel"}  # told apart by Family.matches
    assert len(names) == len(set(names)) and {name for name in types if types.count(name) > 1} == shared
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2"} <= set(types)
    assert all(family.model_types and family.architectures for family in families.known())


# DeepSeek's papers state an initialisation that transformers' defaults do not follow.
CLASSES = {kind.model_type: kind for kind, _ in VARIANTS.values() if not kind.model_type.startswith("deepseek")}


@pytest.mark.parametrize("model_type", CLASSES)
def test_missing_keys_mean_the_defaults_of_the_config_class(model_type: str) -> None:
    full = CLASSES[model_type]().to_dict()
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sparse = {"model_type": model_type, **{key: full[key] for key in sizes if key in full}}
    assert families.build_spec(sparse)[1] == families.build_spec(full)[1]


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_phi3_means_long_rope(kind: str) -> None:
    scaling = {"type": kind, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = {**LLAMA, "model_type": "phi3", "rope_scaling": scaling, "max_position_embeddings": 16384}
    rope = families.build_spec(config)[1].layers[0].attention.position
    factor = (1 + math.log(4) / math.log(4096)) ** 0.5
    expected = LongScaling(short=(1.0,) * 4, long=(2.0,) * 4, original_length=4096, attention_factor=factor)
    assert rope == Rope(dim=8, theta=10000.0, scaling=expected)


def test_rope_scaling_added_to_a_newer_config() -> None:
    """Model cards say to add it to stretch the context: it goes before ``rope_parameters``, as in transformers."""
    added = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    for name, kind in (("qwen3", transformers.Qwen3Config), ("gemma3", transformers.Gemma3TextConfig)):
        config = kind(**VARIANTS[name][1]).to_dict()
        spec = families.build_spec({**config, "rope_scaling": added})[1]
        rules = {layer.attention.position.scaling for layer in spec.layers}
        assert sum(isinstance(rule, YarnScaling) for rule in rules) == 1
        assert (None in rules) == (name == "gemma3")  # whose sliding layers are not stretched


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_original_context_beside_the_scaling(kind: str) -> None:
    rule = {"rope_type": kind, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = {**SIZES, "model_type": "llama", "rope_scaling": rule, "original_max_position_embeddings": 16}
    theirs = transformers.LlamaConfig(**{key: value for key, value in config.items() if key != "model_type"})
    theirs.standardize_rope_params()  # as every model does that is made from it
    assert theirs.rope_parameters["original_max_position_embeddings"] == 16
    assert families.build_spec(config)[1].layers[0].attention.position.scaling.original_length == 16
