"""Mistral 7B and its line: the Llama block with a sliding window on every layer (Jiang et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oarsmith.models.families.base import ConfigReader, Family
from oarsmith.models.families.llama import pre_norm_layer, rms_norm, with_windows
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import attention, decoder, gated_mlp, head_counts, layer_windows, window_size
from oarsmith.models.families.rope import read_rope
from oarsmith.models.spec import DecoderSpec

DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131072}


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader({**DEFAULTS, **config})
    norm = rms_norm(read)
    *_, dim = head_counts(read)
    activation = read.activation("hidden_act", default="silu")
    ffn = gated_mlp(read.integer("hidden_size"), read.integer("intermediate_size"), activation)
    layer = pre_norm_layer(attention(read, read_rope(read, dim)), ffn, norm)
    windows = layer_windows(read, window_size(read), lambda _: True)
    return decoder(read, with_windows(layer, windows), norm)


FAMILY = Family(
    name="mistral",
    model_types=("mistral",),
    architectures=("MistralForCausalLM",),
    build=build,
    tensor_names=Names(),
)
