"""ChatGLM-6B: the prefix language model of GLM (Du et al. 2022) with two rows of positions.

The prompt, up to the start token, is read in both directions. The residual stream carries the normed input times
sqrt(2 * 28), and the rotation's frequencies are those of half precision: the model was trained with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from oarsmith.errors import ModelError
from oarsmith.models.families.base import ConfigReader, Family, Stretching
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import decoder, fused
from oarsmith.models.spec import DecoderSpec, EmbeddingSpec, LayerSpec, NormedStream, PrefixLM, Sequential
from oarsmith.models.spec_parts import GQA, MLP, LayerNormSpec
from oarsmith.models.spec_position import Rope, TwoRowRope

NO_PREFIX = "prompt-tuned prefixes of the authors' code are not read; remove the key to load the base model"
NO_QUANTIZED = "use the checkpoint that is not quantized, and remove the key"
# sqrt(2 * layers) of the released model; the authors' code has this number for every depth.
_STREAM_SCALE = (2 * 28) ** 0.5
# Keys that only the second architecture under this model type has.
_LATER = {"padded_vocab_size", "multi_query_attention", "kv_channels", "ffn_hidden_size", "rmsnorm"}


def is_first(config: Mapping[str, Any]) -> bool:
    """Whether this is ChatGLM-6B, not its successors."""
    return not _LATER & set(config)


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader(config)
    read.refuse("quantization_bit", 0, fix=NO_QUANTIZED)
    read.refuse("pre_seq_len", fix=NO_PREFIX)
    read.refuse("position_encoding_2d", True, fix="ChatGLM-6B was released with two rows of positions")
    hidden, num_layers = read.integer("hidden_size", 4096), read.integer("num_layers", 28)
    inner = read.integer("inner_hidden_size", 16384)
    norm = LayerNormSpec(size=hidden, eps=read.number("layernorm_epsilon", 1e-5))
    stream = NormedStream(norm=norm, scale=_STREAM_SCALE)
    ffn = MLP(
        up=fused(hidden, ("dense_h_to_4h", inner), bias=True),
        down=fused(inner, ("dense_4h_to_h", hidden), bias=True),
        activation="gelu_tanh",
    )
    wiring = Sequential(attention=stream, ffn=stream)
    layer = LayerSpec(attention=_attention(read, hidden), ffn=ffn, wiring=wiring)
    masks = read.count("gmask_token_id", 150001), read.count("mask_token_id", 150000)
    rule = PrefixLM(start_id=read.count("bos_token_id", 150004), mask_ids=masks)
    table, longest = EmbeddingSpec(size=hidden), read.integer("max_sequence_length", 2048)
    spec = decoder(read, [layer] * num_layers, norm, embedding=table, max_positions=longest)
    # The authors' code never ties, whatever the key says.
    return replace(spec, visibility=rule, head=replace(spec.head, tied=False))


def _attention(read: ConfigReader, hidden: int) -> GQA:
    heads = read.integer("num_attention_heads", 32)
    if hidden % (4 * heads):
        raise ModelError(
            f"hidden_size {hidden} does not give each of {heads} heads a multiple of 4 entries",
            where="config.json",
            fix="half of a head turns in pairs by each row of positions",
        )
    dim = hidden // heads
    return GQA(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=dim,
        scale=dim**-0.5,
        qkv=fused(hidden, ("query_key_value", 3 * hidden), bias=True),
        out=fused(hidden, ("dense", hidden), bias=True),
        position=TwoRowRope(rope=Rope(dim=dim // 2, theta=10000.0, fp16_frequencies=True)),
        packing="grouped",
    )


FAMILY = Family(
    name="chatglm",
    model_types=("chatglm",),
    architectures=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
    build=build,
    stretching=Stretching(kinds=(), reason="the base of its two rows of positions is fixed in the authors' code"),
    matches=is_first,
    tensor_names=Names(
        embedding="transformer.word_embeddings",
        layers="transformer.layers",
        attention="attention",
        final_norm="transformer.final_layernorm",
        optional_prefix="transformer.",
    ),
)
