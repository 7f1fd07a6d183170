"""Qwen3 (dense): the Llama block with an RMSNorm on each query and key head, head dim free of the hidden size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oarsmith.models.families.base import ConfigReader, Family
from oarsmith.models.families.llama import pre_norm_layer, rms_norm, with_windows
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import attention, decoder, gated_mlp, head_counts
from oarsmith.models.families.qwen2 import sliding_windows
from oarsmith.models.families.rope import read_rope
from oarsmith.models.spec import DecoderSpec
from oarsmith.models.spec_parts import GQA, QKNorm, RMSNormSpec

DEFAULTS = {"max_position_embeddings": 32768}


def qwen3_attention(read: ConfigReader) -> GQA:
    """Attention of the dense and the MoE models."""
    *_, dim = head_counts(read, 128)
    bias = read.flag("attention_bias", False)
    head_norm = RMSNormSpec(size=dim, eps=read.number("rms_norm_eps", 1e-6))
    return attention(
        read,
        read_rope(read, dim),
        head_dim=128,
        bias=bias,
        out_bias=bias,
        qk_norm=QKNorm(q=head_norm, k=head_norm),
    )


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader({**DEFAULTS, **config})
    norm, activation = rms_norm(read), read.activation("hidden_act", default="silu")
    ffn = gated_mlp(read.integer("hidden_size"), read.integer("intermediate_size"), activation)
    layer = pre_norm_layer(qwen3_attention(read), ffn, norm)
    return decoder(read, with_windows(layer, sliding_windows(read)), norm)


FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM",),
    build=build,
    tensor_names=Names(),
)
