"""Qwen1.5, Qwen2 and Qwen2.5: the Llama block with biases on q, k and v; optionally the upper layers slide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oarsmith.models.families.base import ConfigReader, Family, layer_windows, window_size
from oarsmith.models.families.llama import block_spec, decoder_spec, name_map
from oarsmith.models.spec import DecoderSpec


def sliding_windows(read: ConfigReader) -> list[int | None]:
    """Windows of the Qwen line: off unless ``use_sliding_window``; layers below ``max_window_layers`` stay full."""
    num_layers = read.integer("num_hidden_layers")
    window = window_size(read) if read.flag("use_sliding_window", False) else None
    first = read.config.get("max_window_layers", 28)
    return layer_windows(read, num_layers, window, first if isinstance(first, int) else num_layers)


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader(config)
    block = block_spec(read, activation=read.activation("hidden_act", default="silu"), qkv_bias=True)
    return decoder_spec(read, block, windows=sliding_windows(read))


FAMILY = Family(
    name="qwen2",
    description="Qwen1.5, Qwen2, Qwen2.5 (dense)",
    model_types=("qwen2",),
    architectures=("Qwen2ForCausalLM",),
    build=build,
    names=name_map,
)
