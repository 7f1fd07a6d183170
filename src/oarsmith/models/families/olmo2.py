"""OLMo 2: each part's output is normed instead of its input, and queries and keys over the whole projection.

OLMo Team 2025, "2 OLMo 2 Furious", section 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oarsmith.models.families.base import ConfigReader, Family
from oarsmith.models.families.llama import rms_norm
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import attention, decoder, gated_mlp, head_counts
from oarsmith.models.families.rope import read_rope
from oarsmith.models.spec import DecoderSpec, LayerSpec, OutputNorm, Sequential
from oarsmith.models.spec_parts import QKNorm, RMSNormSpec


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader(config)
    norm, bias = rms_norm(read, 1e-5), read.flag("attention_bias", False)
    heads, kv_heads, dim = head_counts(read)
    qk_norm = QKNorm(
        q=RMSNormSpec(size=heads * dim, eps=norm.eps),
        k=RMSNormSpec(size=kv_heads * dim, eps=norm.eps),
        over="projection",
    )
    activation = read.activation("hidden_act", default="silu")
    layer = LayerSpec(
        attention=attention(read, read_rope(read, dim), bias=bias, out_bias=bias, qk_norm=qk_norm),
        ffn=gated_mlp(read.integer("hidden_size"), read.integer("intermediate_size"), activation),
        wiring=Sequential(attention=OutputNorm(norm=norm), ffn=OutputNorm(norm=norm)),
    )
    return decoder(read, [layer] * read.integer("num_hidden_layers"), norm, padding=1)


FAMILY = Family(
    name="olmo2",
    model_types=("olmo2",),
    architectures=("Olmo2ForCausalLM",),
    build=build,
    tensor_names=Names(attention_norm="post_attention_layernorm", ffn_norm="post_feedforward_layernorm"),
)
