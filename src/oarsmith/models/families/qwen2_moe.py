"""Qwen1.5-MoE and Qwen2-MoE: the Qwen2 block with many small experts and one shared expert behind a sigmoid gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from oarsmith.models.families.base import ConfigReader, Family
from oarsmith.models.families.experts import softmax_experts, sparse_layers
from oarsmith.models.families.llama import pre_norm_layer, rms_norm
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import attention, decoder, gated_mlp, head_counts, layer_windows, window_size
from oarsmith.models.families.rope import read_rope
from oarsmith.models.spec import DecoderSpec

DEFAULTS = {"num_key_value_heads": 16, "max_position_embeddings": 32768}


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader({**DEFAULTS, **config}).renamed(num_experts="num_local_experts")
    hidden, norm = read.integer("hidden_size"), rms_norm(read)
    *_, dim = head_counts(read)
    activation = read.activation("hidden_act", default="silu")
    sparse = softmax_experts(
        read,
        read.integer("moe_intermediate_size", 1408),
        num_experts=read.integer("num_experts", 60),
        top_k=read.integer("num_experts_per_tok", 4),
        normalize=read.flag("norm_topk_prob", False),
        shared=gated_mlp(hidden, read.integer("shared_expert_intermediate_size", 5632), activation),
    )
    dense = gated_mlp(hidden, read.integer("intermediate_size", 5632), activation)
    mixer = attention(read, read_rope(read, dim), bias=read.flag("qkv_bias", True))
    layers = [
        pre_norm_layer(replace(mixer, window=window), ffn, norm)
        for window, ffn in zip(_windows(read), sparse_layers(read, dense, sparse), strict=True)
    ]
    return decoder(read, layers, norm)


def _windows(read: ConfigReader) -> list[int | None]:
    """Off unless ``use_sliding_window``; then every other layer below ``max_window_layers``, unlike dense Qwen2."""
    window = window_size(read) if read.flag("use_sliding_window", False) else None
    border = read.count("max_window_layers", 28)
    return layer_windows(read, window, lambda index: index % 2 == 0 and index < border)


FAMILY = Family(
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    architectures=("Qwen2MoeForCausalLM",),
    build=build,
    tensor_names=Names(),
)
