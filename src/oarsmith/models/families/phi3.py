"""Phi-3, Phi-3.5 and Phi-4-mini: the Llama block with fused projections, LongRoPE and partial rotation.

Abdin et al. 2024, "Phi-3 Technical Report".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oarsmith.models.families.base import ConfigReader, Family, Stretching
from oarsmith.models.families.llama import pre_norm_layer, rms_norm, with_windows
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import attention, decoder, gated_mlp, head_counts
from oarsmith.models.families.rope import read_rope
from oarsmith.models.spec import DecoderSpec

DEFAULTS = {"max_position_embeddings": 4096}


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader({**DEFAULTS, **config, **_long_rope(config)})
    norm = rms_norm(read, 1e-5)
    *_, dim = head_counts(read)
    ffn = gated_mlp(
        read.integer("hidden_size"),
        read.integer("intermediate_size"),
        read.activation("hidden_act", default="silu"),
        names=("gate_up_proj", "down_proj"),
    )
    layer = pre_norm_layer(attention(read, read_rope(read, dim), packed="qkv_proj"), ffn, norm)
    windows = [read.optional_integer("sliding_window")] * read.integer("num_hidden_layers")
    return decoder(read, with_windows(layer, windows), norm, padding=32000)


def _long_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The first releases say "su" or "yarn" where they mean LongRoPE; the original context has a default here."""
    raw = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(raw, Mapping) or raw.get("rope_type", raw.get("type")) not in ("su", "yarn", "longrope"):
        return {}
    key = "original_max_position_embeddings"
    return {
        "rope_parameters": {**raw, "rope_type": "longrope"},
        "rope_scaling": None,
        key: config.get(key) or raw.get(key) or 4096,
    }


FAMILY = Family(
    name="phi3",
    model_types=("phi3",),
    architectures=("Phi3ForCausalLM",),
    build=build,
    stretching=Stretching(kinds=("ntk",), reason="transformers refuses rules other than longrope for this family"),
    tensor_names=Names(),
)
