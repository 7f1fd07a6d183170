"""ChatGLM2, ChatGLM3 and GLM-4-9B in the authors' own layout (model type ``chatglm``, keys like ``padded_vocab_size``).

Adjacent pairs turn in the first half of each head; ``kv_channels`` is free of the hidden size; one fused map gives gate
and up. The keys that only say in which precision something is computed are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from oarsmith.errors import ModelError
from oarsmith.models.families import chatglm
from oarsmith.models.families.base import ConfigReader, Family, Stretching
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import decoder, fused, gated_mlp, residual_rule
from oarsmith.models.spec import DecoderSpec, EmbeddingSpec, LayerSpec
from oarsmith.models.spec_parts import GQA, LayerNormSpec, NormSpec, RMSNormSpec
from oarsmith.models.spec_position import Rope


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader({"hidden_size": 4096, "num_layers": 28, "padded_vocab_size": 65024, **config})
    read.refuse("quantization_bit", 0, fix=chatglm.NO_QUANTIZED)
    read.refuse("pre_seq_len", fix=chatglm.NO_PREFIX)
    read.refuse("vision_config", fix="this model also reads images; only text models are supported")
    read = ConfigReader({**read.config, "vocab_size": read.integer("padded_vocab_size")})
    hidden, norm, bias = read.integer("hidden_size"), _norm(read), read.flag("add_bias_linear", False)
    inner = read.integer("ffn_hidden_size", 13696)
    ffn = gated_mlp(hidden, inner, "silu", names=("dense_h_to_4h", "dense_4h_to_h"), bias=bias)
    layer = LayerSpec(attention=_attention(read, bias), ffn=ffn, wiring=residual_rule(read, norm))
    layers = [layer] * read.integer("num_layers")
    final = norm if read.flag("post_layer_norm", True) else None
    table, longest = EmbeddingSpec(size=hidden), read.integer("seq_length", 2048)
    spec = decoder(read, layers, final, embedding=table, max_positions=longest)
    # The authors' code never ties, whatever the key says.
    return replace(spec, head=replace(spec.head, tied=False))


def _attention(read: ConfigReader, bias: bool) -> GQA:
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads", 32)
    shared = read.flag("multi_query_attention", False)
    groups = read.integer("multi_query_group_num", 1) if shared else heads
    if heads % groups:
        raise ModelError(f"{heads} heads cannot be shared by {groups} key/value heads", where="config.json")
    dim = read.integer("kv_channels", 128)
    rows = (heads + 2 * groups) * dim
    return GQA(
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=dim,
        scale=dim**-0.5,
        qkv=fused(hidden, ("query_key_value", rows), bias=bias or read.flag("add_qkv_bias", False)),
        out=fused(heads * dim, ("dense", hidden), bias=bias),
        position=Rope(dim=dim // 2, theta=10000.0 * read.number("rope_ratio", 1.0), pairs="adjacent"),
        packing="blocks" if shared else "grouped",
    )


def _norm(read: ConfigReader) -> NormSpec:
    hidden, eps = read.integer("hidden_size"), read.number("layernorm_epsilon", 1e-5)
    return RMSNormSpec(size=hidden, eps=eps) if read.flag("rmsnorm", True) else LayerNormSpec(size=hidden, eps=eps)


FAMILY = Family(
    name="chatglm2",
    model_types=("chatglm",),
    architectures=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
    build=build,
    stretching=Stretching(
        kinds=("ntk",),
        reason="the authors' code knows rope_ratio alone, a factor on the base",
        base="rope_ratio",
        base_unit=10000.0,
        lengths=("seq_length",),
    ),
    matches=lambda config: not chatglm.is_first(config),
    tensor_names=Names(
        embedding="transformer.embedding.word_embeddings",
        layers="transformer.encoder.layers",
        attention="self_attention",
        final_norm="transformer.encoder.final_layernorm",
        head="transformer.output_layer",
        optional_prefix="transformer.",
    ),
)
