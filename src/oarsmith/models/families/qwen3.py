"""Qwen3 (dense): the Llama block with an RMSNorm on each query and key head, head dim free of the hidden size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oarsmith.models.families.base import ConfigReader, Family
from oarsmith.models.families.llama import block_spec, decoder_spec, name_map
from oarsmith.models.families.qwen2 import sliding_windows
from oarsmith.models.spec import DecoderSpec


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader(config)
    bias = read.flag("attention_bias", False)
    block = block_spec(
        read,
        activation=read.activation("hidden_act", default="silu"),
        head_dim=128,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
    )
    return decoder_spec(read, block, windows=sliding_windows(read))


FAMILY = Family(
    name="qwen3",
    description="Qwen3 (dense)",
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM",),
    build=build,
    names=name_map,
)
