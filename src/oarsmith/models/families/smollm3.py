"""SmolLM3: the Llama block without positions on every fourth layer (NoPE, Yang et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from oarsmith.errors import ModelError
from oarsmith.models.families.base import ConfigReader, Family
from oarsmith.models.families.llama import pre_norm_layer, rms_norm
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import attention, decoder, gated_mlp, head_counts, layer_windows
from oarsmith.models.families.rope import read_rope
from oarsmith.models.spec import DecoderSpec

DEFAULTS = {"num_key_value_heads": 4, "max_position_embeddings": 32768}


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader({**DEFAULTS, **config})
    norm, bias = rms_norm(read), read.flag("attention_bias", False)
    *_, dim = head_counts(read)
    rope = read_rope(read, dim, 2e6)
    ffn = gated_mlp(
        read.integer("hidden_size"),
        read.integer("intermediate_size"),
        read.activation("hidden_act", default="silu"),
        bias=read.flag("mlp_bias", False),
    )
    mixer, turns = attention(read, rope, bias=bias, out_bias=bias), _rope_layers(read)
    window = read.optional_integer("sliding_window") if read.flag("use_sliding_window", False) else None
    windows = layer_windows(read, window, lambda index: not turns[index])
    layers = [
        pre_norm_layer(replace(mixer, position=rope if turn else None, window=window), ffn, norm)
        for turn, window in zip(turns, windows, strict=True)
    ]
    return decoder(read, layers, norm, tied=True, padding=128004)


def _rope_layers(read: ConfigReader) -> list[bool]:
    """Which layers have positions: ``no_rope_layers`` has a 1 for them, in spite of its name."""
    num_layers, interval = read.integer("num_hidden_layers"), read.integer("no_rope_layer_interval", 4)
    stated = read.integers("no_rope_layers")
    if stated is None:
        return [(index + 1) % interval != 0 for index in range(num_layers)]
    if len(stated) < num_layers or set(stated) - {0, 1}:
        raise ModelError(
            f"no_rope_layers must hold 0 or 1 for each of {num_layers} layers, got {list(stated)}", where="config.json"
        )
    return [bool(value) for value in stated[:num_layers]]


FAMILY = Family(
    name="smollm3",
    model_types=("smollm3",),
    architectures=("SmolLM3ForCausalLM",),
    build=build,
    tensor_names=Names(),
)
