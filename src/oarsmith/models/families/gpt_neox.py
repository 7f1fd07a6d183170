"""GPT-NeoX 20B and Pythia (Black et al. 2022): attention beside the feed-forward part, a quarter of each head turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oarsmith.errors import ModelError
from oarsmith.models.families.base import ConfigReader, Family, Stretching
from oarsmith.models.families.naming import ROPE_BUFFERS, Names
from oarsmith.models.families.parts import decoder, fused
from oarsmith.models.families.rope import read_rope
from oarsmith.models.names import Ignored
from oarsmith.models.spec import DecoderSpec, EmbeddingSpec, LayerSpec, Parallel, PreNorm, Sequential
from oarsmith.models.spec_parts import GQA, MLP, LayerNormSpec


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader(config)
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    inner, bias = read.integer("intermediate_size"), read.flag("attention_bias", True)
    if hidden % heads:
        raise ModelError(f"hidden_size {hidden} is not a multiple of {heads} heads", where="config.json")
    dim = hidden // heads
    # The family's own words for two keys; rope_parameters, which transformers 5 writes, goes before them.
    rope = read_rope(read, dim, read.number("rotary_emb_base", 10000.0), partial=read.number("rotary_pct", 0.25))
    attention = GQA(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=dim,
        scale=dim**-0.5,
        qkv=fused(hidden, ("query_key_value", 3 * hidden), bias=bias),
        out=fused(hidden, ("dense", hidden), bias=bias),
        position=rope,
        packing="grouped",  # each head's query, key and value lie together
    )
    ffn = MLP(
        up=fused(hidden, ("dense_h_to_4h", inner), bias=True),
        down=fused(inner, ("dense_4h_to_h", hidden), bias=True),
        activation=read.activation("hidden_act", default="gelu"),
    )
    norm = LayerNormSpec(size=hidden, eps=read.number("layer_norm_eps", 1e-5))
    if read.flag("use_parallel_residual", True):
        wiring: Parallel | Sequential = Parallel(norm=norm, ffn_norm=norm)
    else:
        wiring = Sequential(attention=PreNorm(norm=norm), ffn=PreNorm(norm=norm))
    layer = LayerSpec(attention=attention, ffn=ffn, wiring=wiring)
    return decoder(read, [layer] * read.integer("num_hidden_layers"), norm, embedding=EmbeddingSpec(size=hidden))


FAMILY = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    architectures=("GPTNeoXForCausalLM",),
    build=build,
    stretching=Stretching(base="rotary_emb_base"),
    tensor_names=Names(
        embedding="gpt_neox.embed_in",
        layers="gpt_neox.layers",
        attention="attention",
        final_norm="gpt_neox.final_layer_norm",
        head="embed_out",
        optional_prefix="gpt_neox.",
        ignored=(ROPE_BUFFERS, Ignored(r".*\.attention\.(masked_)?bias", "the causal mask, stored as a buffer")),
    ),
)
