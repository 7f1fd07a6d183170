"""LLaMA 1, 2, 3, 3.1, 3.2, 3.3 and what copies their layout (SmolLM, TinyLlama, Yi, DeepSeek-LLM, ...).

Touvron et al. 2023; the block of pre-norm RMSNorm, rotary grouped-query attention and SwiGLU is also the base of the
Mistral, Qwen and Gemma files beside this one, which differ in the arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from oarsmith.models import names
from oarsmith.models.families.base import ConfigReader, Family, fused, head_counts, read_rope
from oarsmith.models.names import Duplicate, Ignored, NameMap
from oarsmith.models.spec import GQA, Activation, DecoderSpec, GatedMLP, LayerSpec, RMSNormSpec


def block_spec(
    read: ConfigReader,
    *,
    activation: Activation,
    head_dim: int | None = None,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    unit_offset: bool = False,
    qk_norm: bool = False,
) -> LayerSpec:
    """The block of the Llama line with a family's switches set."""
    hidden, inner = read.integer("hidden_size"), read.integer("intermediate_size")
    heads, kv_heads, dim = head_counts(read, head_dim)
    eps = read.number("rms_norm_eps", 1e-6)
    norm = RMSNormSpec(size=hidden, eps=eps, unit_offset=unit_offset)
    head_norm = RMSNormSpec(size=dim, eps=eps) if qk_norm else None
    attention = GQA(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        scale=dim**-0.5,
        qkv=fused(
            hidden, ("q_proj", heads * dim), ("k_proj", kv_heads * dim), ("v_proj", kv_heads * dim), bias=qkv_bias
        ),
        out=fused(heads * dim, ("o_proj", hidden), bias=out_bias),
        rope=read_rope(read, dim),
        q_norm=head_norm,
        k_norm=head_norm,
    )
    ffn = GatedMLP(
        gate_up=fused(hidden, ("gate_proj", inner), ("up_proj", inner), bias=mlp_bias),
        down=fused(inner, ("down_proj", hidden), bias=mlp_bias),
        activation=activation,
    )
    return LayerSpec(attention=attention, ffn=ffn, attention_norm=norm, ffn_norm=norm)


def decoder_spec(
    read: ConfigReader,
    block: LayerSpec,
    *,
    windows: Sequence[int | None] | None = None,
    tied: bool = False,
    embedding_scale: float | None = None,
) -> DecoderSpec:
    """``num_hidden_layers`` copies of ``block``, each with its window."""
    num_layers = read.integer("num_hidden_layers")
    layers = tuple(
        replace(block, attention=replace(block.attention, window=window)) for window in windows or [None] * num_layers
    )
    return DecoderSpec(
        vocab_size=read.integer("vocab_size"),
        hidden_size=read.integer("hidden_size"),
        layers=layers,
        final_norm=block.attention_norm,
        tied=read.flag("tie_word_embeddings", tied),
        max_positions=read.integer("max_position_embeddings", 2048),
        embedding_scale=embedding_scale,
        init_std=read.number("initializer_range", 0.02),
    )


def name_map(spec: DecoderSpec) -> NameMap:
    """The tensor names of the Llama line."""
    found: list[names.Place | Ignored | Duplicate] = [
        names.Place("model.embed_tokens.weight", "embedding.weight", names.whole)
    ]
    for index, layer in enumerate(spec.layers):
        file, here = f"model.layers.{index}", f"layers.{index}"
        attention, ffn = layer.attention, layer.ffn
        assert isinstance(ffn, GatedMLP)
        found += names.norm(f"{file}.input_layernorm", f"{here}.attention_norm", layer.attention_norm)
        found += names.linear(f"{file}.self_attn", f"{here}.attention.qkv", attention.qkv)
        found += names.linear(f"{file}.self_attn", f"{here}.attention.out", attention.out)
        if attention.q_norm and attention.k_norm:
            found += names.norm(f"{file}.self_attn.q_norm", f"{here}.attention.q_norm", attention.q_norm)
            found += names.norm(f"{file}.self_attn.k_norm", f"{here}.attention.k_norm", attention.k_norm)
        found += names.norm(f"{file}.post_attention_layernorm", f"{here}.ffn_norm", layer.ffn_norm)
        found += names.linear(f"{file}.mlp", f"{here}.ffn.gate_up", ffn.gate_up)
        found += names.linear(f"{file}.mlp", f"{here}.ffn.down", ffn.down)
    found += names.norm("model.norm", "final_norm", spec.final_norm)
    if spec.tied:
        found.append(Duplicate("lm_head.weight", "embedding.weight"))
    else:
        found.append(names.Place("lm_head.weight", "head.weight", names.whole))
    found.append(Ignored(r".*rotary_emb\.inv_freq", "computed from the config"))
    return NameMap(tuple(found), optional_prefix="model.")


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader(config)
    bias = read.flag("attention_bias", False)
    block = block_spec(
        read,
        activation=read.activation("hidden_act", default="silu"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=read.flag("mlp_bias", False),
    )
    return decoder_spec(read, block)


FAMILY = Family(
    name="llama",
    description="LLaMA 1 to 3.3 and models of that layout (SmolLM, TinyLlama, Yi, ...)",
    model_types=("llama",),
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    build=build,
    names=name_map,
)
