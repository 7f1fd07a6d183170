"""GLM-4-9B and GLM-4-0414 in their library layout: half of each head turns, adjacent pairs, fused gate and up.

GLM-4-0414 (``glm4``) norms before and after each part. GLM Team 2024, "ChatGLM: A Family of Large Language Models".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from oarsmith.models.families.base import ConfigReader, Family
from oarsmith.models.families.llama import pre_norm_layer, rms_norm
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import attention, decoder, gated_mlp, head_counts
from oarsmith.models.families.rope import read_rope
from oarsmith.models.spec import DecoderSpec, LayerSpec, Sandwich, Sequential
from oarsmith.models.spec_parts import RMSNormSpec

DEFAULTS = {"num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072}
_PADDING = 151329


def _layer(read: ConfigReader) -> LayerSpec:
    *_, dim = head_counts(read)
    rope = read_rope(read, dim, partial=0.5, pairs="adjacent")
    ffn = gated_mlp(
        read.integer("hidden_size"),
        read.integer("intermediate_size"),
        read.activation("hidden_act", default="silu"),
        names=("gate_up_proj", "down_proj"),
    )
    return pre_norm_layer(attention(read, rope, bias=read.flag("attention_bias", True)), ffn, _norm(read))


def _norm(read: ConfigReader) -> RMSNormSpec:
    return rms_norm(read, 1.5625e-7)


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader({**DEFAULTS, **config})
    return decoder(read, [_layer(read)] * read.integer("num_hidden_layers"), _norm(read), padding=_PADDING)


def build_sandwich(config: Mapping[str, Any]) -> DecoderSpec:
    """``glm4``."""
    read = ConfigReader({**DEFAULTS, **config})
    residual = Sandwich(norm=_norm(read), post_norm=_norm(read))
    layer = replace(_layer(read), wiring=Sequential(attention=residual, ffn=residual))
    return decoder(read, [layer] * read.integer("num_hidden_layers"), _norm(read), padding=_PADDING)


FAMILY = Family(
    name="glm",
    model_types=("glm",),
    architectures=("GlmForCausalLM",),
    build=build,
    tensor_names=Names(),
)
GLM4 = Family(
    name="glm4",
    model_types=("glm4",),
    architectures=("Glm4ForCausalLM",),
    build=build_sandwich,
    tensor_names=Names(attention_post_norm="post_self_attn_layernorm", ffn_post_norm="post_mlp_layernorm"),
)
