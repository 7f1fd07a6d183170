"""Baichuan and Baichuan 2: the Llama block with one W_pack for q, k and v. Four models under one model type.

=============  =====================  ==============================  =====  ========
model          architecture           told by                         place  head
=============  =====================  ==============================  =====  ========
7B             BaiChuanForCausalLM    its capital C                   rope   plain
13B            BaichuanForCausalLM    no ``max_position_embeddings``  ALiBi  plain
Baichuan2-7B   BaichuanForCausalLM    ``max_position_embeddings``     rope   NormHead
Baichuan2-13B  BaichuanForCausalLM    vocabulary or tokenizer_class   ALiBi  NormHead
=============  =====================  ==============================  =====  ========

NormHead divides the rows of the output matrix by their length; files store them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oarsmith.models.families.base import ConfigReader, Family, Stretching
from oarsmith.models.families.llama import pre_norm_layer, rms_norm
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import attention, decoder, gated_mlp, head_counts, padding_row
from oarsmith.models.families.rope import read_rope
from oarsmith.models.spec import DecoderSpec, EmbeddingSpec, HeadSpec
from oarsmith.models.spec_position import Alibi, Position, alibi_slopes

_FIRST_7B = "BaiChuan"
_SECOND_VOCABULARY = 125696


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader(config)
    hidden, norm = read.integer("hidden_size"), rms_norm(read)
    mixer = attention(read, _position(read), packed="W_pack")
    ffn = gated_mlp(hidden, read.integer("intermediate_size"), read.activation("hidden_act", default="silu"))
    return decoder(
        read,
        [pre_norm_layer(mixer, ffn, norm)] * read.integer("num_hidden_layers"),
        norm,
        embedding=EmbeddingSpec(size=hidden, padding_id=padding_row(read, 0)),
        head=HeadSpec(tied=False, normalized=_has_norm_head(read)),
        max_positions=read.integer("max_position_embeddings", read.integer("model_max_length", 4096)),
    )


def _has_rope(read: ConfigReader) -> bool:
    return _is_first_7b(read) or read.config.get("max_position_embeddings") is not None


def _position(read: ConfigReader) -> Position:
    heads, _, dim = head_counts(read)
    return read_rope(read, dim) if _has_rope(read) else Alibi(slopes=alibi_slopes(heads))


def _has_norm_head(read: ConfigReader) -> bool:
    """Rope under the second architecture is Baichuan2-7B; the two 13B configs differ in what the tokenizer needs."""
    if read.config.get("norm_head") is not None:
        return read.flag("norm_head", False)
    if _has_rope(read):
        return not _is_first_7b(read)
    second = read.integer("vocab_size") == _SECOND_VOCABULARY
    return second or read.config.get("tokenizer_class") == "BaichuanTokenizer"


def _is_first_7b(read: ConfigReader) -> bool:
    names = read.config.get("architectures") or ()
    return any(name.startswith(_FIRST_7B) for name in names)


FAMILY = Family(
    name="baichuan",
    model_types=("baichuan",),
    architectures=(f"{_FIRST_7B}ForCausalLM", "BaichuanForCausalLM"),
    build=build,
    stretching=Stretching(kinds=(), reason="the authors' code reads neither a scaling rule nor a base"),
    tensor_names=Names(),
)
