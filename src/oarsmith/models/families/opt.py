"""OPT (Zhang et al. 2022) and Galactica: learned positions after two unused rows; the 350M model normalises afterwards.

350M also has embeddings narrower than the hidden states, with a projection on each side, and no final norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from oarsmith.models.families.base import ConfigReader, Family
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import attention, decoder, fused, padding_row
from oarsmith.models.spec import (
    DecoderSpec,
    EmbeddingSpec,
    HeadSpec,
    LayerSpec,
    LearnedPositions,
    PostNorm,
    PreNorm,
    Residual,
    Sequential,
)
from oarsmith.models.spec_parts import MLP, LayerNormSpec


def build(config: Mapping[str, Any]) -> DecoderSpec:
    sizes = {"vocab_size": 50272, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    read = ConfigReader({**sizes, **config}).renamed(initializer_range="init_std")
    hidden, inner = read.integer("hidden_size"), read.integer("ffn_dim", 3072)
    num_layers, positions = read.integer("num_hidden_layers"), read.integer("max_position_embeddings", 2048)
    bias, before = read.flag("enable_bias", True), read.flag("do_layer_norm_before", True)
    norm = LayerNormSpec(size=hidden, eps=1e-5, affine=read.flag("layer_norm_elementwise_affine", True))
    rule: Residual = PreNorm(norm=norm) if before else PostNorm(norm=norm)
    ffn = MLP(
        up=fused(hidden, ("fc1", inner), bias=bias),
        down=fused(inner, ("fc2", hidden), bias=bias),
        activation=read.activation("activation_function", default="relu"),
    )
    mixer = attention(read, None, bias=bias, out_bias=bias, out="out_proj")
    layer = LayerSpec(attention=mixer, ffn=ffn, wiring=Sequential(attention=rule, ffn=rule))
    width = read.integer("word_embed_proj_dim", hidden)
    narrow = width != hidden
    spec = decoder(
        read,
        [layer] * num_layers,
        # Models fine-tuned with early versions of transformers have no final norm and say so.
        norm if before and not read.flag("_remove_final_layer_norm", False) else None,
        embedding=EmbeddingSpec(
            size=width,
            positions=LearnedPositions(size=positions, offset=2),
            projection=fused(width, ("project_in", hidden)) if narrow else None,
            padding_id=padding_row(read, 1),
        ),
        head=HeadSpec(tied=True, projection=fused(hidden, ("project_out", width)) if narrow else None),
        tied=True,
        max_positions=positions,
    )
    return replace(spec, residual_init_std=spec.init_std / (2 * num_layers) ** 0.5)


FAMILY = Family(
    name="opt",
    model_types=("opt",),
    architectures=("OPTForCausalLM", "OPTModel"),
    build=build,
    tensor_names=Names(
        embedding="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        embedding_projection="model.decoder",
        layers="model.decoder.layers",
        ffn="",
        attention_norm="self_attn_layer_norm",
        ffn_norm="final_layer_norm",
        final_norm="model.decoder.final_layer_norm",
        head_projection="model.decoder",
        optional_prefix="model.",
    ),
)
