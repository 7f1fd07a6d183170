"""Qwen1.5, Qwen2 and Qwen2.5: the Llama block with biases on q, k and v; optionally the upper layers slide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oarsmith.models.families.base import ConfigReader, Family
from oarsmith.models.families.llama import pre_norm_layer, rms_norm, with_windows
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import attention, decoder, gated_mlp, head_counts, layer_windows, window_size
from oarsmith.models.families.rope import read_rope
from oarsmith.models.spec import DecoderSpec

DEFAULTS = {"max_position_embeddings": 32768}


def sliding_windows(read: ConfigReader) -> list[int | None]:
    """Windows of the Qwen line: off unless ``use_sliding_window``; layers below ``max_window_layers`` stay full."""
    window = window_size(read) if read.flag("use_sliding_window", False) else None
    first = read.count("max_window_layers", 28)
    return layer_windows(read, window, lambda index: index >= first)


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader({**DEFAULTS, **config})
    norm = rms_norm(read)
    *_, dim = head_counts(read)
    activation = read.activation("hidden_act", default="silu")
    ffn = gated_mlp(read.integer("hidden_size"), read.integer("intermediate_size"), activation)
    layer = pre_norm_layer(attention(read, read_rope(read, dim), bias=True), ffn, norm)
    return decoder(read, with_windows(layer, sliding_windows(read)), norm)


FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    architectures=("Qwen2ForCausalLM",),
    build=build,
    tensor_names=Names(),
)
