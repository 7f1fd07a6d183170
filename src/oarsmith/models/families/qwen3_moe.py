"""Qwen3-MoE: the Qwen3 block with many small experts and none shared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from oarsmith.models.families.base import ConfigReader, Family
from oarsmith.models.families.experts import softmax_experts, sparse_layers
from oarsmith.models.families.llama import pre_norm_layer, rms_norm
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import decoder, gated_mlp, head_counts, window_size
from oarsmith.models.families.qwen3 import qwen3_attention
from oarsmith.models.spec import DecoderSpec

DEFAULTS = {"num_key_value_heads": 4, "max_position_embeddings": 32768}


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader({**DEFAULTS, **config}).renamed(num_experts="num_local_experts")
    if read.config.get("head_dim") is None:  # unlike the dense models: no 128 where the config is silent
        *_, dim = head_counts(read)
        read = ConfigReader({**read.config, "head_dim": dim})
    norm = rms_norm(read)
    sparse = softmax_experts(
        read,
        read.integer("moe_intermediate_size", 768),
        num_experts=read.integer("num_experts", 128),
        top_k=read.integer("num_experts_per_tok", 8),
        normalize=read.flag("norm_topk_prob", False),
    )
    activation = read.activation("hidden_act", default="silu")
    dense = gated_mlp(read.integer("hidden_size"), read.integer("intermediate_size", 6144), activation)
    window = window_size(read) if read.flag("use_sliding_window", False) else None
    mixer = replace(qwen3_attention(read), window=window)
    return decoder(read, [pre_norm_layer(mixer, ffn, norm) for ffn in sparse_layers(read, dense, sparse)], norm)


FAMILY = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    architectures=("Qwen3MoeForCausalLM",),
    build=build,
    tensor_names=Names(),
)
