"""Gemma 3, text: Gemma 2 with normed queries and keys; local layers slide and have a rotary base of their own.

Gemma Team 2025, "Gemma 3 Technical Report".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from oarsmith.errors import ModelError
from oarsmith.models.families.base import ConfigReader, Family
from oarsmith.models.families.gemma import gemma_norm
from oarsmith.models.families.gemma2 import (
    SANDWICH_NAMES,
    STRETCHING,
    gemma_decoder,
    refuse_bidirectional,
    sandwich_layer,
)
from oarsmith.models.families.parts import attention, head_counts, layer_windows, window_size
from oarsmith.models.families.rope import read_rope
from oarsmith.models.spec import DecoderSpec, LayerSpec
from oarsmith.models.spec_parts import QKNorm
from oarsmith.models.spec_position import Rope

DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
}


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader({**DEFAULTS, **config})
    _refuse_others(read)
    bias = read.flag("attention_bias", False)
    *_, dim = head_counts(read)
    head_norm, (local, whole) = gemma_norm(read, dim), _ropes(read, dim)
    mixer = attention(read, whole, bias=bias, out_bias=bias, qk_norm=QKNorm(q=head_norm, k=head_norm))
    pattern = read.integer("sliding_window_pattern", 6)

    def layer(window: int | None) -> LayerSpec:
        position = whole if window is None else local
        return sandwich_layer(read, replace(mixer, window=window, position=position))

    windows = layer_windows(read, window_size(read), lambda index: (index + 1) % pattern != 0)
    return gemma_decoder(read, [layer(window) for window in windows])


def _ropes(read: ConfigReader, dim: int) -> tuple[Rope, Rope]:
    """(of sliding layers, of full layers). In older configs ``rope_scaling`` is for the full layers alone."""
    stated = read.config.get("rope_parameters")
    if isinstance(stated, Mapping) and read.config.get("rope_scaling"):
        base = (stated.get("full_attention") or {}).get("rope_theta")
        full = {"rope_theta": base, **read.config["rope_scaling"]}
        stated = {**stated, "full_attention": full}
        read = ConfigReader({**read.config, "rope_parameters": stated, "rope_scaling": None})
    whole = read_rope(read, dim, 1e6, layer_type="full_attention")
    if isinstance(stated, Mapping):
        return read_rope(read, dim, 1e4, layer_type="sliding_attention"), whole
    return Rope(dim=dim, theta=read.number("rope_local_base_freq", 1e4)), whole


def _refuse_others(read: ConfigReader) -> None:
    refuse_bidirectional(read)
    if read.config.get("attn_logit_softcapping") is not None:
        raise ModelError(
            "attn_logit_softcapping is set, which Gemma 3 does not have (it norms queries and keys instead)",
            where="config.json",
            fix="set it to null: transformers ignores the key for this model",
        )


FAMILY = Family(
    name="gemma3_text",
    model_types=("gemma3_text",),
    architectures=("Gemma3ForCausalLM",),
    build=build,
    stretching=STRETCHING,
    tensor_names=SANDWICH_NAMES,
    inside=("gemma3",),
)
