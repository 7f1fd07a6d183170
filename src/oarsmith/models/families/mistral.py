"""Mistral 7B and its line: the Llama block with a sliding window on every layer (Jiang et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oarsmith.models.families.base import ConfigReader, Family, layer_windows, window_size
from oarsmith.models.families.llama import block_spec, decoder_spec, name_map
from oarsmith.models.spec import DecoderSpec


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader(config)
    block = block_spec(read, activation=read.activation("hidden_act", default="silu"))
    windows = layer_windows(read, read.integer("num_hidden_layers"), window_size(read), 0)
    return decoder_spec(read, block, windows=windows)


FAMILY = Family(
    name="mistral",
    description="Mistral with or without a sliding window",
    model_types=("mistral",),
    architectures=("MistralForCausalLM",),
    build=build,
    names=name_map,
)
