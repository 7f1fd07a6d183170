"""Gemma 2: norms before and after each part, soft caps on scores and logits, every other layer slides.

Gemma Team 2024, "Gemma 2: Improving Open Language Models at a Practical Size".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from oarsmith.errors import ModelError
from oarsmith.models.families.base import ConfigReader, Family, Stretching
from oarsmith.models.families.gemma import gemma_embedding, gemma_norm
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import attention, decoder, gated_mlp, head_counts, layer_windows, window_size
from oarsmith.models.families.rope import read_rope
from oarsmith.models.spec import DecoderSpec, HeadSpec, LayerSpec, Sandwich, Sequential
from oarsmith.models.spec_parts import GQA

DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
SANDWICH_NAMES = Names(
    attention_post_norm="post_attention_layernorm",
    ffn_norm="pre_feedforward_layernorm",
    ffn_post_norm="post_feedforward_layernorm",
)


def sandwich_layer(read: ConfigReader, mixer: GQA) -> LayerSpec:
    """A layer of Gemma 2 and 3 around its attention, to which scale and soft cap are added here."""
    hidden = read.integer("hidden_size")
    norm = gemma_norm(read, hidden)
    activation = read.activation("hidden_activation", default="gelu_pytorch_tanh")
    residual = Sandwich(norm=norm, post_norm=norm)
    scale = read.positive("query_pre_attn_scalar", 256) ** -0.5
    return LayerSpec(
        attention=replace(mixer, scale=scale, softcap=_soft_cap(read, "attn_logit_softcapping")),
        ffn=gated_mlp(hidden, read.integer("intermediate_size"), activation),
        wiring=Sequential(attention=residual, ffn=residual),
    )


def gemma_decoder(read: ConfigReader, layers: list[LayerSpec]) -> DecoderSpec:
    """The whole of Gemma 2 and 3. Their configs state the context with its scaling, whatever the rule."""
    head = HeadSpec(tied=True, softcap=_soft_cap(read, "final_logit_softcapping"))
    norm = gemma_norm(read, read.integer("hidden_size"))
    longest = read.integer("max_position_embeddings")
    return decoder(read, layers, norm, tied=True, embedding=gemma_embedding(read), head=head, max_positions=longest)


def _soft_cap(read: ConfigReader, key: str) -> float | None:
    return None if read.config.get(key) is None else read.positive(key)


def refuse_bidirectional(read: ConfigReader) -> None:
    """Encoders made of these models (EmbeddingGemma) see both ways: not a decoder."""
    if read.flag("use_bidirectional_attention", False):
        raise ModelError(
            "use_bidirectional_attention is true: this is an encoder, not a language model",
            where="config.json",
            fix="use a checkpoint made for text generation",
        )


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader({**DEFAULTS, **config})
    refuse_bidirectional(read)
    bias = read.flag("attention_bias", False)
    *_, dim = head_counts(read)
    mixer = attention(read, read_rope(read, dim), bias=bias, out_bias=bias)
    windows = layer_windows(read, window_size(read), lambda index: index % 2 == 0)
    return gemma_decoder(read, [sandwich_layer(read, replace(mixer, window=window)) for window in windows])


STRETCHING = Stretching(
    kinds=("linear", "ntk", "yarn"),
    reason="dynamic takes max_position_embeddings for the trained length; here it is the stretched one",
    grow_with=("linear", "ntk", "yarn"),
)
FAMILY = Family(
    name="gemma2",
    model_types=("gemma2",),
    architectures=("Gemma2ForCausalLM",),
    build=build,
    stretching=STRETCHING,
    tensor_names=SANDWICH_NAMES,
)
