"""Mixtral 8x7B and 8x22B: the Mistral block with eight experts, two for each token (Jiang et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oarsmith.models.families.base import ConfigReader, Family
from oarsmith.models.families.experts import softmax_experts
from oarsmith.models.families.llama import pre_norm_layer, rms_norm, with_windows
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import attention, decoder, head_counts
from oarsmith.models.families.rope import read_rope
from oarsmith.models.spec import DecoderSpec

DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131072}


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader({**DEFAULTS, **config}).renamed(num_local_experts="num_experts")
    norm = rms_norm(read, 1e-5)
    *_, dim = head_counts(read)
    experts = softmax_experts(
        read,
        read.integer("intermediate_size"),
        num_experts=read.integer("num_local_experts", 8),
        top_k=read.integer("num_experts_per_tok", 2),
        normalize=True,
        names=("w1", "w3", "w2"),
    )
    layer = pre_norm_layer(attention(read, read_rope(read, dim, 1e6)), experts, norm)
    windows = [read.optional_integer("sliding_window")] * read.integer("num_hidden_layers")
    return decoder(read, with_windows(layer, windows), norm)


FAMILY = Family(
    name="mixtral",
    model_types=("mixtral",),
    architectures=("MixtralForCausalLM",),
    build=build,
    tensor_names=Names(ffn="block_sparse_moe"),
)
