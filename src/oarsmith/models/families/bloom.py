"""BLOOM (Scao et al. 2022): ALiBi, a norm on the embedding, q, k and v packed head by head, biases everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from oarsmith.errors import ModelError
from oarsmith.models.families.base import ConfigReader, Family
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import decoder, fused, residual_rule
from oarsmith.models.spec import DecoderSpec, EmbeddingSpec, LayerSpec
from oarsmith.models.spec_parts import GQA, MLP, LayerNormSpec
from oarsmith.models.spec_position import Alibi, alibi_slopes


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = _spelled_anew(config)
    if read.flag("slow_but_exact", False) and read.integer("pretraining_tp", 1) > 1:
        fix = 'set "slow_but_exact": false; the exact path leaves out biases that the model was trained with'
        read.refuse("slow_but_exact", False, fix=fix)
    hidden, heads = read.integer("hidden_size", 64), read.integer("num_attention_heads", 8)
    num_layers = read.integer("num_hidden_layers", 2)
    if hidden % heads:
        raise ModelError(f"hidden_size {hidden} is not a multiple of {heads} heads", where="config.json")
    dim = hidden // heads
    norm = LayerNormSpec(size=hidden, eps=read.number("layer_norm_epsilon", 1e-5))
    attention = GQA(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=dim,
        scale=dim**-0.5,
        qkv=fused(hidden, ("query_key_value", 3 * hidden), bias=True),
        out=fused(hidden, ("dense", hidden), bias=True),
        position=Alibi(slopes=alibi_slopes(heads)),
        packing="grouped",
    )
    ffn = MLP(
        up=fused(hidden, ("dense_h_to_4h", 4 * hidden), bias=True),
        down=fused(4 * hidden, ("dense_4h_to_h", hidden), bias=True),
        activation="gelu_tanh",
    )
    layer = LayerSpec(attention=attention, ffn=ffn, wiring=residual_rule(read, norm))
    embedding = EmbeddingSpec(size=hidden, norm=norm)
    longest = read.integer("seq_length", 2048)
    spec = decoder(read, [layer] * num_layers, norm, tied=True, embedding=embedding, max_positions=longest)
    return replace(spec, residual_init_std=spec.init_std / (2 * num_layers) ** 0.5)


def _spelled_anew(config: Mapping[str, Any]) -> ConfigReader:
    """``n_embed`` of the released files goes before ``hidden_size``, as in the family's config class."""
    size = config.get("n_embed")
    read = ConfigReader(config if size is None else {**config, "hidden_size": size})
    return read.renamed(num_attention_heads="n_head", num_hidden_layers="n_layer")


FAMILY = Family(
    name="bloom",
    model_types=("bloom",),
    architectures=("BloomForCausalLM", "BloomModel"),
    build=build,
    tensor_names=Names(
        embedding="transformer.word_embeddings",
        embedding_norm="transformer.word_embeddings_layernorm",
        layers="transformer.h",
        attention="self_attention",
        final_norm="transformer.ln_f",
        optional_prefix="transformer.",
    ),
)
