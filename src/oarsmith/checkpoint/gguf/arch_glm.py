"""GGUF tables of the families with fused projections: ChatGLM2 and 3, GLM-4, Phi-3, Baichuan.

Source: llama.cpp's conversion/chatglm.py, glm.py, phi.py, baichuan.py.
"""

from __future__ import annotations

from typing import Any

from oarsmith.checkpoint.gguf.arch_llama import (
    EMBEDDING,
    HEAD,
    SILU,
    attention,
    fused_mlp,
    gated_mlp,
    note_window,
    pre_norms,
    top,
    with_gate_up,
)
from oarsmith.checkpoint.gguf.family import RMS, Config, Dims, Family, Fixed, Notes
from oarsmith.checkpoint.gguf.links import KEEP, UNIT_ROWS, Link, in_layers, linear, link, norm, permute, split_rows
from oarsmith.checkpoint.gguf.metadata import Metadata
from oarsmith.checkpoint.gguf.rope import RopeStyle
from oarsmith.models.families import build_spec


def _chatglm_links(config: Config, dims: Dims) -> list[Link]:
    layer = [
        *norm("attn_norm", "input_layernorm"),
        *linear("attn_qkv", "self_attention.query_key_value", "qkv hidden", bias=True),
        *linear("attn_output", "self_attention.dense", "hidden q", bias=False),
        *norm("ffn_norm", "post_attention_layernorm"),
        *fused_mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ]
    return [
        link(EMBEDDING, "transformer.embedding.word_embeddings.weight", "vocab hidden"),
        *norm("output_norm", "transformer.encoder.final_layernorm"),
        link(HEAD, "transformer.output_layer.weight", "vocab hidden", required=False),
        *in_layers("transformer.encoder.layers.", layer, range(dims["layers"])),
    ]


def _chatglm_sizes(config: Config, dims: Dims) -> None:
    with_gate_up(config, dims)
    if not config.get("multi_query_attention", True):
        dims["kv_heads"] = dims["heads"]


def _chatglm_read(metadata: Metadata, config: dict[str, Any]) -> None:
    head, ratio = config["kv_channels"], metadata.real("rope.freq_base", 10000.0) / 10000
    if metadata.whole("rope.dimension_count", head // 2) != head // 2:
        raise metadata.error("rope.dimension_count", f"must be half of the head size {head}")
    config["rope_ratio"] = int(ratio) if ratio.is_integer() else ratio
    config["multi_query_attention"] = True


def _chatglm_write(config: Config, dims: Dims, metadata: dict[str, Any], notes: Notes) -> None:
    if dims["q"] != dims["hidden"]:
        raise config.error(
            "kv_channels",
            f"llama.cpp wants kv_channels * heads to be hidden_size, {dims['hidden']}; here it is {dims['q']}",
        )
    metadata["rope.dimension_count"] = dims["head"] // 2
    metadata["rope.freq_base"] = 10000.0 * config.real("rope_ratio", 1.0)


def _glm_links(config: Config, dims: Dims) -> list[Link]:
    layer = [*pre_norms(), *attention(dims, bias=None), *fused_mlp("mlp.gate_up_proj", "mlp.down_proj")]
    return [*top(), *in_layers("model.layers.", layer, range(dims["layers"]))]


def _glm4_links(config: Config, dims: Dims) -> list[Link]:
    sandwich = [
        *norm("post_attention_norm", "post_self_attn_layernorm"),
        *norm("post_ffw_norm", "post_mlp_layernorm"),
    ]
    return [*_glm_links(config, dims), *in_layers("model.layers.", sandwich, range(dims["layers"]))]


def _read_attention_bias(metadata: Metadata, config: dict[str, Any]) -> None:
    config["attention_bias"] = metadata.has("blk.0.attn_q.bias")


def _phi3_links(config: Config, dims: Dims) -> list[Link]:
    layer = [
        *pre_norms(),
        link("attn_qkv.weight", "self_attn.qkv_proj.weight", "qkv hidden"),
        link("attn_output.weight", "self_attn.o_proj.weight", "hidden q"),
        *fused_mlp("mlp.gate_up_proj", "mlp.down_proj"),
    ]
    return [*top(), *in_layers("model.layers.", layer, range(dims["layers"]))]


def _phi3_read(metadata: Metadata, config: dict[str, Any]) -> None:
    config["sliding_window"] = metadata.optional("attention.sliding_window") or None
    original = metadata.whole("rope.scaling.original_context_length", config["max_position_embeddings"])
    config["original_max_position_embeddings"] = original


def _phi3_write(config: Config, dims: Dims, metadata: dict[str, Any], notes: Notes) -> None:
    # 0 tells Phi-4 from Phi-3 in llama.cpp.
    metadata["attention.sliding_window"] = config.whole("sliding_window", default=0)
    original = config.whole("original_max_position_embeddings", default=dims["context"])
    metadata.setdefault("rope.scaling.original_context_length", original)
    note_window(config, dims, metadata, notes)


def _normalises_head(config: Config) -> bool:
    """Baichuan 2: the head's rows count by their direction only."""
    return build_spec(config.values)[1].head.normalized


def _baichuan_links(config: Config, dims: Dims) -> list[Link]:
    q = dims["q"]
    layer = [
        *pre_norms(),
        link(
            ("attn_q.weight", "attn_k.weight", "attn_v.weight"),
            "self_attn.W_pack.weight",
            ("q hidden", "q hidden", "q hidden"),
            split_rows([q, q, q], [permute(dims["heads"]), permute(dims["heads"]), KEEP]),
        ),
        link("attn_output.weight", "self_attn.o_proj.weight", "hidden q"),
        *gated_mlp(),
    ]
    names = top()
    if _normalises_head(config):
        names[-1] = link(HEAD, "lm_head.weight", "vocab hidden", UNIT_ROWS, required=False)
    return [*names, *in_layers("model.layers.", layer, range(dims["layers"]))]


def _baichuan_write(config: Config, dims: Dims, metadata: dict[str, Any], notes: Notes) -> None:
    layers = 40 if config.get("max_position_embeddings") is None else 32
    if dims["layers"] != layers:
        kind = "ALiBi (13B)" if layers == 40 else "rotary embedding (7B)"
        raise config.error(
            "num_hidden_layers", f"llama.cpp computes a Baichuan with {kind} only if it has {layers} layers"
        )
    if _normalises_head(config):
        notes.append("the head's rows are stored with length 1: llama.cpp does not normalise them as Baichuan 2 does")


def _baichuan_read(metadata: Metadata, config: dict[str, Any]) -> None:
    if config["num_hidden_layers"] == 40:  # the 13B models have ALiBi, and name their length otherwise
        config["model_max_length"] = config.pop("max_position_embeddings")
    # The file does not say which of the two generations it is, and a second one's rows have length 1 already.
    config["norm_head"] = False


FAMILIES = (
    Family(
        arch="chatglm",
        model_type="glm",
        class_name="GlmForCausalLM",
        links=_glm_links,
        rope=RopeStyle(partial=0.5),
        epsilon_default=1.5625e-7,
        fixed=(SILU,),
        matches=lambda metadata: metadata.has("blk.0.attn_q.weight"),
        sizes=with_gate_up,
        read=_read_attention_bias,
    ),
    Family(
        arch="chatglm",
        model_type="chatglm",
        class_name="ChatGLMModel",
        links=_chatglm_links,
        spelling={
            "layers": "num_layers",
            "ffn": "ffn_hidden_size",
            "kv_heads": "multi_query_group_num",
            "head": "kv_channels",
            "context": "seq_length",
            "vocab": "padded_vocab_size",
        },
        epsilon=(RMS, "layernorm_epsilon"),
        epsilon_default=1e-5,
        rope=None,
        fixed=(
            Fixed("add_qkv_bias", True),
            Fixed("add_bias_linear", False),
            Fixed("apply_residual_connection_post_layernorm", False),
            Fixed("post_layer_norm", True),
            Fixed("rmsnorm", True),
            Fixed("original_rope", True),
        ),
        sizes=_chatglm_sizes,
        read=_chatglm_read,
        write=_chatglm_write,
    ),
    Family(
        arch="glm4",
        model_type="glm4",
        class_name="Glm4ForCausalLM",
        links=_glm4_links,
        rope=RopeStyle(partial=0.5),
        epsilon_default=1.5625e-7,
        fixed=(SILU,),
        sizes=with_gate_up,
        read=_read_attention_bias,
    ),
    Family(
        arch="phi3",
        model_type="phi3",
        class_name="Phi3ForCausalLM",
        links=_phi3_links,
        spelling={"head": None},
        rope=RopeStyle(partial=1.0),
        epsilon_default=1e-5,
        fixed=(SILU,),
        sizes=with_gate_up,
        read=_phi3_read,
        write=_phi3_write,
    ),
    Family(
        arch="baichuan",
        model_type="baichuan",
        class_name="BaichuanForCausalLM",
        links=_baichuan_links,
        spelling={"kv_heads": None, "head": None},
        epsilon_default=1e-6,
        fixed=(SILU,),
        stores_tied_head=True,
        read=_baichuan_read,
        write=_baichuan_write,
    ),
)
