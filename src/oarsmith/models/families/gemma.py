"""Gemma 1: the Llama block with norms of 1 + w, embeddings times sqrt(hidden) and GeGLU; tied unless configured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oarsmith.models.families.base import ConfigReader, Family
from oarsmith.models.families.llama import block_spec, decoder_spec, name_map
from oarsmith.models.spec import DecoderSpec


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader(config)
    activation = read.activation("hidden_activation", "hidden_act", default="gelu_pytorch_tanh")
    bias = read.flag("attention_bias", False)
    block = block_spec(
        read,
        # The first released configs say "gelu" but the models were trained with the tanh approximation.
        activation="gelu_tanh" if activation == "gelu" else activation,
        head_dim=256,
        qkv_bias=bias,
        out_bias=bias,
        unit_offset=True,
    )
    return decoder_spec(read, block, tied=True, embedding_scale=read.integer("hidden_size") ** 0.5)


FAMILY = Family(
    name="gemma",
    description="Gemma 1 (2B, 7B)",
    model_types=("gemma",),
    architectures=("GemmaForCausalLM",),
    build=build,
    names=name_map,
)
