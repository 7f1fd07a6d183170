"""InternLM2 and 2.5: the Llama block under the authors' names, with wqkv packed kv head by kv head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from oarsmith.models.families.base import ConfigReader, Family, Stretching
from oarsmith.models.families.llama import pre_norm_layer, rms_norm
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import attention, decoder, gated_mlp, head_counts, padding_row
from oarsmith.models.families.rope import read_rope
from oarsmith.models.spec import DecoderSpec, EmbeddingSpec


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader(config)
    hidden, norm, bias = read.integer("hidden_size"), rms_norm(read), read.flag("bias", True)
    *_, dim = head_counts(read)
    mixer = attention(read, read_rope(read, dim), bias=bias, out_bias=bias, packed="wqkv", out="wo")
    mixer = replace(mixer, packing="grouped")
    activation = read.activation("hidden_act", default="silu")
    ffn = gated_mlp(hidden, read.integer("intermediate_size"), activation, names=("w1", "w3", "w2"))
    embedding = EmbeddingSpec(size=hidden, padding_id=padding_row(read, 0))
    layers = [pre_norm_layer(mixer, ffn, norm)] * read.integer("num_hidden_layers")
    return decoder(read, layers, norm, embedding=embedding)


FAMILY = Family(
    name="internlm2",
    model_types=("internlm2",),
    architectures=("InternLM2ForCausalLM",),
    build=build,
    stretching=Stretching(
        kinds=("linear", "ntk", "dynamic"), reason="the authors' code reads the types linear and dynamic alone"
    ),
    tensor_names=Names(
        embedding="model.tok_embeddings",
        attention="attention",
        ffn="feed_forward",
        attention_norm="attention_norm",
        ffn_norm="ffn_norm",
        head="output",
    ),
)
