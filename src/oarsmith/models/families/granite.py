"""Granite 3: the Llama block with multipliers on embeddings, attention scores, residual branches and logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from oarsmith.models.families.base import ConfigReader, Family
from oarsmith.models.families.llama import rms_norm
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import attention, decoder, gated_mlp, head_counts, padding_row
from oarsmith.models.families.rope import read_rope
from oarsmith.models.spec import DecoderSpec, EmbeddingSpec, HeadSpec, LayerSpec, PreNorm, Sequential


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader(config)
    hidden, norm, bias = read.integer("hidden_size"), rms_norm(read), read.flag("attention_bias", False)
    *_, dim = head_counts(read)
    mixer = attention(read, read_rope(read, dim), bias=bias, out_bias=bias)
    ffn = gated_mlp(
        hidden,
        read.integer("intermediate_size"),
        read.activation("hidden_act", default="silu"),
        bias=read.flag("mlp_bias", False),
    )
    residual = PreNorm(norm=norm, scale=read.number("residual_multiplier", 1.0))
    layer = LayerSpec(
        attention=replace(mixer, scale=read.number("attention_multiplier", 1.0)),
        ffn=ffn,
        wiring=Sequential(attention=residual, ffn=residual),
    )
    scale = read.number("embedding_multiplier", 1.0)
    embedding = EmbeddingSpec(size=hidden, scale=scale, padding_id=padding_row(read))
    head = HeadSpec(tied=False, scale=1 / read.positive("logits_scaling", 1.0))
    return decoder(read, [layer] * read.integer("num_hidden_layers"), norm, embedding=embedding, head=head)


FAMILY = Family(
    name="granite",
    model_types=("granite",),
    architectures=("GraniteForCausalLM",),
    build=build,
    tensor_names=Names(),
)
