"""Gemma 1: the Llama block with norms of 1 + w, embeddings times sqrt(hidden) and GeGLU; tied unless configured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oarsmith.models.families.base import ConfigReader, Family
from oarsmith.models.families.llama import pre_norm_layer
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import attention, decoder, gated_mlp, head_counts, padding_row
from oarsmith.models.families.rope import read_rope
from oarsmith.models.spec import DecoderSpec, EmbeddingSpec
from oarsmith.models.spec_parts import Activation, RMSNormSpec

DEFAULTS = {"max_position_embeddings": 8192}


def gemma_norm(read: ConfigReader, size: int) -> RMSNormSpec:
    """x / rms(x) * (1 + w)."""
    return RMSNormSpec(size=size, eps=read.number("rms_norm_eps", 1e-6), unit_offset=True)


def gemma_embedding(read: ConfigReader) -> EmbeddingSpec:
    """The table's rows times sqrt(hidden)."""
    hidden = read.integer("hidden_size")
    return EmbeddingSpec(size=hidden, scale=hidden**0.5, padding_id=padding_row(read, 0))


def gemma_activation(read: ConfigReader) -> Activation:
    """The first released configs say "gelu" but the models were trained with the tanh approximation."""
    activation = read.activation("hidden_activation", "hidden_act", default="gelu_pytorch_tanh")
    return "gelu_tanh" if activation == "gelu" else activation


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader({**DEFAULTS, **config})
    bias, hidden = read.flag("attention_bias", False), read.integer("hidden_size")
    *_, dim = head_counts(read, 256)
    mixer = attention(read, read_rope(read, dim), head_dim=256, bias=bias, out_bias=bias)
    ffn = gated_mlp(hidden, read.integer("intermediate_size"), gemma_activation(read))
    norm = gemma_norm(read, hidden)
    layers = [pre_norm_layer(mixer, ffn, norm)] * read.integer("num_hidden_layers")
    return decoder(read, layers, norm, tied=True, embedding=gemma_embedding(read))


FAMILY = Family(
    name="gemma",
    model_types=("gemma",),
    architectures=("GemmaForCausalLM",),
    build=build,
    tensor_names=Names(),
)
