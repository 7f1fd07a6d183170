"""Qwen-1 (1.8B to 72B): the authors' own block with fused q, k, v, two rules for long inputs, and w1, w2 swapped.

``intermediate_size`` is twice the width of w1 and w2, and w2 is the activated one. Both long-input rules (base of the
rotation by the prompt's length, queries times a logarithm) are off in training, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from oarsmith.errors import ModelError
from oarsmith.models.families.base import ConfigReader, Family, Stretching
from oarsmith.models.families.naming import ROPE_BUFFERS, Names
from oarsmith.models.families.parts import decoder, fused, gated_mlp, residual_rule
from oarsmith.models.names import Ignored
from oarsmith.models.spec import DecoderSpec, EmbeddingSpec, LayerSpec, PreNorm, Sequential
from oarsmith.models.spec_parts import GQA, RMSNormSpec
from oarsmith.models.spec_position import Rope, SteppedScaling


def build(config: Mapping[str, Any]) -> DecoderSpec:
    first = "n_embd" in config  # the first release's spelling and defaults
    read = ConfigReader(config).renamed(
        hidden_size="n_embd",
        num_attention_heads="n_head",
        num_hidden_layers="n_layer",
        max_position_embeddings="n_positions",
        intermediate_size="ffn_hidden_size",
    )
    _refuse_options(read)
    hidden, num_layers = read.integer("hidden_size"), read.integer("num_hidden_layers")
    bias, norm = not read.flag("no_bias", True), _norm(read, 1e-5 if first else 1e-6)
    inner = read.integer("intermediate_size", 22016) // 2
    ffn = gated_mlp(hidden, inner, "silu", names=("w2", "w1", "c_proj"), bias=bias)
    # Later releases have no code for apply_residual_connection_post_layernorm.
    wiring = residual_rule(read, norm) if first else Sequential(attention=PreNorm(norm=norm), ffn=PreNorm(norm=norm))
    layer = LayerSpec(attention=_attention(read, bias, first), ffn=ffn, wiring=wiring)
    longest = read.integer("max_position_embeddings", 8192)
    table = EmbeddingSpec(size=hidden)
    spec = decoder(read, [layer] * num_layers, norm, embedding=table, max_positions=longest)
    return replace(spec, residual_init_std=spec.init_std / (2 * num_layers) ** 0.5)


def _attention(read: ConfigReader, bias: bool, first: bool) -> GQA:
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    dim = read.integer("kv_channels", 128)
    if dim * heads != hidden:
        raise ModelError(
            f"kv_channels {dim} times {heads} heads is not hidden_size {hidden}",
            where="config.json",
            fix="the authors' code cuts q, k and v at hidden_size, so these must agree",
        )
    share = read.number("rotary_pct", 1.0)
    if not 0 < share <= 1:
        raise ModelError(f"rotary_pct must lie in (0, 1], got {share}", where="config.json")
    stepped = read.flag("use_dynamic_ntk", not first)
    log_n = read.flag("use_logn_attn", not first)
    return GQA(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=dim,
        scale=dim**-0.5 if read.flag("scale_attn_weights", True) else 1.0,
        qkv=fused(hidden, ("c_attn", 3 * hidden), bias=True),
        out=fused(hidden, ("c_proj", hidden), bias=bias),
        position=Rope(
            dim=int(dim * share),
            theta=read.number("rotary_emb_base", 10000.0),
            scaling=SteppedScaling(original_length=read.integer("seq_length")) if stepped else None,
        ),
        log_n=read.integer("seq_length") if log_n else None,
    )


def _norm(read: ConfigReader, eps: float) -> RMSNormSpec:
    return RMSNormSpec(size=read.integer("hidden_size"), eps=read.number("layer_norm_epsilon", eps))


def _refuse_options(read: ConfigReader) -> None:
    read.refuse("pos_emb", "rotary", fix="Qwen-1 was released with rotary positions")
    read.refuse("activation", "swiglu", fix="Qwen-1 was released with SwiGLU")
    read.refuse("use_cache_quantization", False, fix='set "use_cache_quantization": false; the cache is kept as it is')
    read.refuse(
        "padded_vocab_size",
        read.config.get("vocab_size"),
        fix="the head of this file has another number of rows than its embedding; make vocab_size and it agree",
    )


FAMILY = Family(
    name="qwen",
    model_types=("qwen",),
    architectures=("QWenLMHeadModel",),
    build=build,
    stretching=Stretching(
        kinds=("ntk",),
        reason="the authors' code knows the base alone, and use_dynamic_ntk outside training",
        base="rotary_emb_base",
        lengths=("max_position_embeddings", "n_positions", "seq_length"),
    ),
    tensor_names=Names(
        embedding="transformer.wte",
        layers="transformer.h",
        attention="attn",
        attention_norm="ln_1",
        ffn_norm="ln_2",
        final_norm="transformer.ln_f",
        optional_prefix="transformer.",
        ignored=(
            ROPE_BUFFERS,
            Ignored(r"transformer\.h\.\d+\.attn\.(masked_bias|bias|logn_tensor)", "constants of the authors' code"),
        ),
    ),
)
