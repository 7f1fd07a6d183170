"""gpt-oss (OpenAI 2025, arXiv 2508.10925): attention sinks, alternating windows, experts with a clamped SwiGLU.

The softmax over the chosen experts' logits is the softmax over all of them, normalised over the chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from oarsmith.models.families.base import ConfigReader, Family
from oarsmith.models.families.llama import pre_norm_layer, rms_norm, with_windows
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import attention, decoder, gated_mlp, layer_windows
from oarsmith.models.families.rope import read_rope
from oarsmith.models.spec import DecoderSpec
from oarsmith.models.spec_parts import ClampedSwiGLU, MoE, RouterSpec

_DEFAULTS: dict[str, Any] = {
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 8,
    "num_local_experts": 128,
    "sliding_window": 128,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}
_YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader(dict(config)).renamed(num_experts_per_tok="experts_per_token", num_local_experts="num_experts")
    defaults = _DEFAULTS if {"rope_parameters", "rope_scaling"} & set(config) else {**_DEFAULTS, "rope_scaling": _YARN}
    read = ConfigReader({**defaults, **read.config})
    bias, hidden, norm = read.flag("attention_bias", True), read.integer("hidden_size"), rms_norm(read, 1e-5)
    rope = read_rope(read, read.integer("head_dim"), theta=150000.0)
    mixer = replace(attention(read, rope, bias=bias, out_bias=bias), sinks=True)
    router = RouterSpec(
        num_experts=read.integer("num_local_experts"), top_k=read.integer("num_experts_per_tok"), bias=True
    )
    clamped = ClampedSwiGLU(alpha=read.number("swiglu_alpha"), limit=read.number("swiglu_limit"))
    inner, names = read.integer("intermediate_size"), ("gate_up_proj", "down_proj")
    experts = gated_mlp(hidden, inner, clamped, names=names, bias=True, experts=router.num_experts)
    windows = layer_windows(read, read.optional_integer("sliding_window"), lambda index: index % 2 == 0)
    layer = pre_norm_layer(mixer, MoE(router=router, experts=experts), norm)
    return decoder(read, with_windows(layer, windows), norm)


FAMILY = Family(
    name="gpt_oss",
    model_types=("gpt_oss",),
    architectures=("GptOssForCausalLM",),
    build=build,
    tensor_names=Names(router="router", experts="experts", stacked_experts=True),
)
