"""Yuan 2 (2B, 51B, 102B): the Llama block with localized filtering attention (Wu et al. 2023).

The activation is on ``up_proj``. Whether attention starts anew after <eod> is one option in training and needs a second
one outside it; positions and the filter always go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from oarsmith.errors import ModelError
from oarsmith.models.families.base import ConfigReader, Family, Stretching
from oarsmith.models.families.llama import pre_norm_layer, rms_norm
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import decoder, fused, gated_mlp, padding_row
from oarsmith.models.families.rope import read_rope
from oarsmith.models.spec import DecoderSpec, EmbeddingSpec, ResetAfter
from oarsmith.models.spec_parts import LFA, RMSNormSpec

_EOD = 77185


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader(config)
    read.refuse("use_shareqk", False, fix="the released models have separate q_proj and k_proj")
    read.refuse("causal_mask", True, fix="only causal models are supported")
    read.refuse("moe_config", fix="Yuan2-M32 (experts) is not supported; the dense Yuan 2 models are")
    hidden, norm = read.integer("hidden_size"), rms_norm(read)
    activation = read.activation("hidden_act", default="silu")
    names = ("up_proj", "gate_proj", "down_proj")
    ffn = gated_mlp(hidden, read.integer("intermediate_size"), activation, names=names)
    spec = decoder(
        read,
        [pre_norm_layer(_attention(read), ffn, norm)] * read.integer("num_hidden_layers"),
        norm,
        tied=True,
        embedding=EmbeddingSpec(size=hidden, padding_id=padding_row(read, _EOD)),
        max_positions=read.integer("max_position_embeddings", read.integer("model_max_length", 8192)),
    )
    return replace(spec, visibility=_visibility(read))


def _attention(read: ConfigReader) -> LFA:
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    if hidden % heads:
        raise ModelError(f"hidden_size {hidden} is not a multiple of {heads} heads", where="config.json")
    dim = hidden // heads
    return LFA(
        num_heads=heads,
        head_dim=dim,
        scale=dim**-0.5,
        qk=fused(hidden, ("q_proj", hidden), ("k_proj", hidden)),
        v=fused(hidden, ("v_proj", hidden)),
        out=fused(hidden, ("o_proj", hidden)),
        # The filter's norm keeps the class default whatever rms_norm_eps is.
        filter_norm=RMSNormSpec(size=hidden, eps=1e-6),
        position=read_rope(read, dim),
    )


def _visibility(read: ConfigReader) -> ResetAfter | None:
    if not read.flag("reset_attention_mask", False):
        return None
    end = read.count("eod_token", read.count("eod_token_id", _EOD))
    return ResetAfter(end_id=end, training_only=not read.flag("reset_position_ids", False))


FAMILY = Family(
    name="yuan",
    model_types=("yuan",),
    architectures=("YuanForCausalLM",),
    build=build,
    stretching=Stretching(kinds=(), reason="the authors' code reads neither a scaling rule nor a base"),
    tensor_names=Names(filter="lf_gate"),
)
