"""StarCoder2: LayerNorm, biases, a plain GELU feed-forward part, rotary grouped-query attention with a window.

Lozhkov et al. 2024, "StarCoder 2 and The Stack v2".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from oarsmith.models.families.base import ConfigReader, Family
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import attention, decoder, fused, head_counts
from oarsmith.models.families.rope import read_rope
from oarsmith.models.spec import DecoderSpec, LayerSpec, PreNorm, Sequential
from oarsmith.models.spec_parts import MLP, LayerNormSpec

DEFAULTS = {"num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.018042}


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader({**DEFAULTS, **config})
    hidden, inner = read.integer("hidden_size"), read.integer("intermediate_size")
    bias, norm = read.flag("use_bias", True), LayerNormSpec(size=hidden, eps=read.number("norm_epsilon", 1e-5))
    *_, dim = head_counts(read)
    mixer = attention(read, read_rope(read, dim), bias=bias, out_bias=bias)
    ffn = MLP(
        up=fused(hidden, ("c_fc", inner), bias=bias),
        down=fused(inner, ("c_proj", hidden), bias=bias),
        activation=read.activation("hidden_act", default="gelu_pytorch_tanh"),
    )
    layer = LayerSpec(
        attention=replace(mixer, window=read.optional_integer("sliding_window")),
        ffn=ffn,
        wiring=Sequential(attention=PreNorm(norm=norm), ffn=PreNorm(norm=norm)),
    )
    return decoder(read, [layer] * read.integer("num_hidden_layers"), norm, tied=True)


FAMILY = Family(
    name="starcoder2",
    model_types=("starcoder2",),
    architectures=("Starcoder2ForCausalLM",),
    build=build,
    tensor_names=Names(),
)
