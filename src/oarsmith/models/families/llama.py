"""LLaMA 1, 2, 3, 3.1, 3.2, 3.3 and what copies their layout (SmolLM, TinyLlama, Yi, DeepSeek-LLM, ...).

Touvron et al. 2023; the block of pre-norm RMSNorm, rotary grouped-query attention and SwiGLU is also the base of many
files beside this one, which differ in the arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from oarsmith.models.families.base import ConfigReader, Family
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import attention, decoder, gated_mlp, head_counts
from oarsmith.models.families.rope import read_rope
from oarsmith.models.spec import DecoderSpec, LayerSpec, PreNorm, Sequential
from oarsmith.models.spec_parts import FFN, GQA, AttentionSpec, RMSNormSpec


def rms_norm(read: ConfigReader, eps: float = 1e-6) -> RMSNormSpec:
    """The norm of the hidden size with the config's epsilon."""
    return RMSNormSpec(size=read.integer("hidden_size"), eps=read.number("rms_norm_eps", eps))


def pre_norm_layer(attention: AttentionSpec, ffn: FFN, norm: RMSNormSpec) -> LayerSpec:
    """x += attention(norm(x)); x += ffn(norm(x))."""
    return LayerSpec(
        attention=attention, ffn=ffn, wiring=Sequential(attention=PreNorm(norm=norm), ffn=PreNorm(norm=norm))
    )


def with_windows(layer: LayerSpec, windows: Sequence[int | None]) -> list[LayerSpec]:
    """One layer for each window."""
    assert isinstance(layer.attention, GQA), layer
    return [replace(layer, attention=replace(layer.attention, window=window)) for window in windows]


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader(config)
    bias, norm = read.flag("attention_bias", False), rms_norm(read)
    *_, dim = head_counts(read)
    mixer = attention(read, read_rope(read, dim), bias=bias, out_bias=bias)
    ffn = gated_mlp(
        read.integer("hidden_size"),
        read.integer("intermediate_size"),
        read.activation("hidden_act", default="silu"),
        bias=read.flag("mlp_bias", False),
    )
    layer = pre_norm_layer(mixer, ffn, norm)
    return decoder(read, [layer] * read.integer("num_hidden_layers"), norm)


FAMILY = Family(
    name="llama",
    model_types=("llama",),
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    build=build,
    tensor_names=Names(),
)
