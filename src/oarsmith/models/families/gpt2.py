"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, GELU, biases, weights stored as Conv1D [in, out]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from oarsmith.errors import ModelError
from oarsmith.models.families.base import ConfigReader, Family
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import decoder, fused
from oarsmith.models.names import Ignored
from oarsmith.models.spec import DecoderSpec, EmbeddingSpec, LayerSpec, LearnedPositions, PreNorm, Sequential
from oarsmith.models.spec_parts import GQA, MLP, LayerNormSpec


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader({"n_embd": 768, "vocab_size": 50257, **config}).renamed(hidden_size="n_embd")
    hidden, heads, num_layers = read.integer("n_embd"), read.integer("n_head", 12), read.integer("n_layer", 12)
    positions = read.integer("n_positions", read.integer("n_ctx", 1024))
    if hidden % heads:
        raise ModelError(f"n_embd {hidden} is not a multiple of n_head {heads}", where="config.json")
    dim, inner = hidden // heads, read.integer("n_inner", 4 * hidden)
    norm = LayerNormSpec(size=hidden, eps=read.number("layer_norm_epsilon", 1e-5))
    scale = dim**-0.5 if read.flag("scale_attn_weights", True) else 1.0
    by_layer = read.flag("scale_attn_by_inverse_layer_idx", False)

    def layer(index: int) -> LayerSpec:
        attention = GQA(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=dim,
            scale=scale / (index + 1) if by_layer else scale,
            qkv=fused(hidden, ("c_attn", 3 * hidden), bias=True),
            out=fused(hidden, ("c_proj", hidden), bias=True),
            position=None,
        )
        ffn = MLP(
            up=fused(hidden, ("c_fc", inner), bias=True),
            down=fused(inner, ("c_proj", hidden), bias=True),
            activation=read.activation("activation_function", default="gelu_new"),
        )
        return LayerSpec(
            attention=attention, ffn=ffn, wiring=Sequential(attention=PreNorm(norm=norm), ffn=PreNorm(norm=norm))
        )

    embedding = EmbeddingSpec(size=hidden, positions=LearnedPositions(size=positions))
    layers = [layer(index) for index in range(num_layers)]
    spec = decoder(read, layers, norm, tied=True, embedding=embedding, max_positions=positions)
    return replace(spec, residual_init_std=spec.init_std / (2 * num_layers) ** 0.5)


FAMILY = Family(
    name="gpt2",
    model_types=("gpt2",),
    architectures=("GPT2LMHeadModel", "GPT2Model"),
    build=build,
    tensor_names=Names(
        embedding="transformer.wte",
        positions="transformer.wpe",
        layers="transformer.h",
        attention="attn",
        attention_norm="ln_1",
        ffn_norm="ln_2",
        final_norm="transformer.ln_f",
        optional_prefix="transformer.",
        transposed=True,
        ignored=(Ignored(r"transformer\.h\.\d+\.attn\.(masked_)?bias", "the causal mask, a constant"),),
    ),
)
