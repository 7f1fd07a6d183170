"""Falcon (Almazrouei et al. 2023): attention and MLP side by side, one key/value head (7B) or one a group (40B, 180B).

``RefinedWebModel`` and ``RefinedWeb`` are the model types of the first files. Falcon-RW is sequential with ALiBi. With
``multi_query`` there is one key/value head whatever ``num_kv_heads`` says; without it and without the new architecture
there is one for each query head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oarsmith.errors import ModelError
from oarsmith.models.families.base import ConfigReader, Family
from oarsmith.models.families.naming import ROPE_BUFFERS, Names
from oarsmith.models.families.parts import decoder, fused
from oarsmith.models.families.rope import read_rope
from oarsmith.models.names import Ignored
from oarsmith.models.spec import DecoderSpec, EmbeddingSpec, LayerSpec, Parallel, PreNorm, Sequential
from oarsmith.models.spec_parts import GQA, MLP, LayerNormSpec
from oarsmith.models.spec_position import Alibi, Position, alibi_slopes


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = _spelled_anew(config)
    read.refuse(
        "apply_residual_connection_post_layernorm", False, fix="no released Falcon uses it, and no code reads it"
    )
    hidden, bias = read.integer("hidden_size"), read.flag("bias", False)
    norm = LayerNormSpec(size=hidden, eps=read.number("layer_norm_epsilon", 1e-5))
    inner = read.integer("ffn_hidden_size", 4 * hidden)
    ffn = MLP(
        up=fused(hidden, ("dense_h_to_4h", inner), bias=bias),
        down=fused(inner, ("dense_4h_to_h", hidden), bias=bias),
        activation=read.activation("activation", default="gelu"),
    )
    layer = LayerSpec(attention=_attention(read, bias), ffn=ffn, wiring=_wiring(read, norm))
    num_layers = read.integer("num_hidden_layers", 32)
    return decoder(read, [layer] * num_layers, norm, tied=True, embedding=EmbeddingSpec(size=hidden))


def has_two_norms(config: Mapping[str, Any]) -> bool:
    """Whether attention and MLP each have a norm on the way in (the new architecture, unless it says one)."""
    read = _spelled_anew(config)
    number = read.integer("num_ln_in_parallel_attn", 2)
    if number > 2:
        raise ModelError(f"num_ln_in_parallel_attn must be 1 or 2, got {number}", where="config.json")
    return _is_new(read) and number == 2


def _attention(read: ConfigReader, bias: bool) -> GQA:
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads", 71)
    groups = heads
    if _is_new(read):
        groups = read.integer("num_kv_heads", heads)
    elif read.flag("multi_query", True):
        groups = 1
    if hidden % heads:
        raise ModelError(f"hidden_size {hidden} is not a multiple of {heads} heads", where="config.json")
    if heads % groups:
        raise ModelError(f"{heads} heads cannot be shared by {groups} key/value heads", where="config.json")
    dim = hidden // heads
    return GQA(
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=dim,
        scale=dim**-0.5,
        qkv=fused(hidden, ("query_key_value", (heads + 2 * groups) * dim), bias=bias),
        out=fused(hidden, ("dense", hidden), bias=bias),
        position=_position(read, heads, dim),
        packing="grouped",
    )


def _position(read: ConfigReader, heads: int, dim: int) -> Position:
    """The authors add the penalty before the scores are scaled, so it is scaled too."""
    if read.flag("alibi", False):
        return Alibi(slopes=alibi_slopes(heads), bf16=True, scale=dim**-0.5)
    return read_rope(read, dim)


def _wiring(read: ConfigReader, norm: LayerNormSpec) -> Sequential | Parallel:
    if has_two_norms(read.config):
        return Parallel(norm=norm, ffn_norm=norm)
    if _is_new(read) or read.flag("parallel_attn", True):
        return Parallel(norm=norm)
    return Sequential(attention=PreNorm(norm=norm), ffn=PreNorm(norm=norm))


def _is_new(read: ConfigReader) -> bool:
    """The first files of the 40B model lack the key, but only they have ``n_head_kv``."""
    return read.flag("new_decoder_architecture", read.config.get("n_head_kv") is not None)


def _spelled_anew(config: Mapping[str, Any]) -> ConfigReader:
    """``n_embed`` goes before ``hidden_size``, as in the family's config class."""
    size = config.get("n_embed")
    read = ConfigReader(config if size is None else {**config, "hidden_size": size})
    return read.renamed(num_attention_heads="n_head", num_hidden_layers="n_layer", num_kv_heads="n_head_kv")


def _family(name: str, *, two_norms: bool, attention_norm: str, ffn_norm: str) -> Family:
    return Family(
        name=name,
        model_types=("falcon", "RefinedWeb", "RefinedWebModel"),
        architectures=("FalconForCausalLM", "RWForCausalLM", "FalconModel", "RWModel"),
        build=build,
        matches=lambda config: has_two_norms(config) == two_norms,
        tensor_names=Names(
            embedding="transformer.word_embeddings",
            layers="transformer.h",
            attention="self_attention",
            final_norm="transformer.ln_f",
            optional_prefix="transformer.",
            ignored=(ROPE_BUFFERS, Ignored(r".*\.(maybe_)?rotary\.inv_freq", "computed from the config")),
            attention_norm=attention_norm,
            ffn_norm=ffn_norm,
        ),
    )


FAMILY = _family("falcon", two_norms=False, attention_norm="input_layernorm", ffn_norm="post_attention_layernorm")
FAMILY_40B = _family("falcon_40b", two_norms=True, attention_norm="ln_attn", ffn_norm="ln_mlp")
