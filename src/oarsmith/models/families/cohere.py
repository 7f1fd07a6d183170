"""Command R: attention and feed-forward side by side after one LayerNorm without bias, adjacent rotary pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oarsmith.models.families.base import ConfigReader, Family
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import attention, decoder, gated_mlp, head_counts
from oarsmith.models.families.rope import read_rope
from oarsmith.models.spec import DecoderSpec, HeadSpec, LayerSpec, Parallel
from oarsmith.models.spec_parts import LayerNormSpec, QKNorm

DEFAULTS = {"max_position_embeddings": 8192}


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader({**DEFAULTS, **config})
    hidden, eps = read.integer("hidden_size"), read.number("layer_norm_eps", 1e-5)
    heads, kv_heads, dim = head_counts(read)
    bias, norm = read.flag("attention_bias", False), LayerNormSpec(size=hidden, eps=eps, bias=False)
    qk_norm = None
    if read.flag("use_qk_norm", False):
        qk_norm = QKNorm(
            q=LayerNormSpec(size=dim, eps=eps, bias=False, heads=heads),
            k=LayerNormSpec(size=dim, eps=eps, bias=False, heads=kv_heads),
        )
    rope = read_rope(read, dim, 5e5, pairs="adjacent")
    activation = read.activation("hidden_act", default="silu")
    layer = LayerSpec(
        attention=attention(read, rope, bias=bias, out_bias=bias, qk_norm=qk_norm),
        ffn=gated_mlp(hidden, read.integer("intermediate_size"), activation),
        wiring=Parallel(norm=norm),
    )
    head = HeadSpec(tied=True, scale=read.number("logit_scale", 0.0625))
    return decoder(read, [layer] * read.integer("num_hidden_layers"), norm, tied=True, head=head, padding=0)


FAMILY = Family(
    name="cohere",
    model_types=("cohere",),
    architectures=("CohereForCausalLM",),
    build=build,
    tensor_names=Names(),
)
