"""GGUF tables of DeepSeek-V2 and V3: attention with a latent key/value, dense layers first, then experts.

Source: llama.cpp's conversion/deepseek.py. Files since 2025 hold kv_b_proj as two tensors and describe one wide
key/value head (``key_length_mla`` is then there); older ones hold it whole.
"""

from __future__ import annotations

from typing import Any

from oarsmith.checkpoint.gguf.arch_llama import SILU, gated_mlp, pre_norms, top
from oarsmith.checkpoint.gguf.arch_moe import USED, experts, shared_expert
from oarsmith.checkpoint.gguf.family import Config, Dims, Family, Field, Fixed, Notes
from oarsmith.checkpoint.gguf.links import Link, Part, in_layers, latent_kv, link, norm
from oarsmith.checkpoint.gguf.metadata import Metadata
from oarsmith.checkpoint.gguf.rope import RopeStyle

_SOFTMAX, _SIGMOID = 1, 2  # expert_gating_func


def _attention(config: Config, dims: Dims) -> list[Link]:
    links = [
        link("attn_kv_a_mqa.weight", "self_attn.kv_a_proj_with_mqa.weight", "kv_a hidden"),
        *norm("attn_kv_a_norm", "self_attn.kv_a_layernorm", "kv_lora"),
        link(
            ("attn_k_b.weight", "attn_v_b.weight"),
            "self_attn.kv_b_proj.weight",
            ("heads kv_lora nope", "heads value kv_lora"),
            latent_kv(dims["heads"], dims["nope"], dims["value"]),
            older=Part("attn_kv_b.weight", "kv_b kv_lora"),
        ),
        link("attn_output.weight", "self_attn.o_proj.weight", "hidden o"),
    ]
    if dims["q_lora"]:
        links += [
            link("attn_q_a.weight", "self_attn.q_a_proj.weight", "q_lora hidden"),
            *norm("attn_q_a_norm", "self_attn.q_a_layernorm", "q_lora"),
            link("attn_q_b.weight", "self_attn.q_b_proj.weight", "q q_lora"),
        ]
    else:
        links.append(link("attn_q.weight", "self_attn.q_proj.weight", "q hidden"))
    return links


def _links(config: Config, dims: Dims) -> list[Link]:
    dense = range(min(dims["dense_layers"], dims["layers"]))
    sparse = range(len(dense), dims["layers"])
    moe = [
        link("ffn_gate_inp.weight", "mlp.gate.weight", "experts hidden"),
        *experts("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
        *(shared_expert("mlp.shared_experts") if dims["shared_ffn"] else []),
    ]
    if config.get("model_type") == "deepseek_v3":
        moe.append(link("exp_probs_b.bias", "mlp.gate.e_score_correction_bias", "experts"))
    return [
        *top(),
        *in_layers("model.layers.", [*pre_norms(), *_attention(config, dims)], range(dims["layers"])),
        *in_layers("model.layers.", gated_mlp(), dense),
        *in_layers("model.layers.", moe, sparse),
    ]


def _sizes(config: Config, dims: Dims) -> None:
    nope, rope, value = (config.whole(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    heads, latent = dims["heads"], config.whole("kv_lora_rank")
    expert_ffn = config.whole("moe_intermediate_size")
    dims |= {
        "nope": nope,
        "rope": rope,
        "value": value,
        "kv_lora": latent,
        "q_lora": config.whole("q_lora_rank", default=0),
        "q": heads * (nope + rope),
        "o": heads * value,
        "kv_a": latent + rope,
        "kv_b": heads * (nope + value),
        "experts": config.whole("n_routed_experts", "num_local_experts", default=0),
        "expert_ffn": expert_ffn,
        "shared_ffn": config.whole("n_shared_experts", default=0) * expert_ffn,
        "dense_layers": config.whole("first_k_dense_replace", default=0),
        "kv_heads": heads,
    }


def _read(metadata: Metadata, config: dict[str, Any]) -> None:
    rope, latent = metadata.whole("rope.dimension_count"), metadata.whole("attention.kv_lora_rank")
    suffix = "" if metadata.optional("attention.key_length_mla") is None else "_mla"
    key, value = (metadata.whole(f"attention.{side}_length{suffix}") for side in ("key", "value"))
    if key <= rope:
        raise metadata.error(f"attention.key_length{suffix}", f"{key} has no room for {rope} rotated dimensions")
    config |= {
        "num_key_value_heads": config["num_attention_heads"],
        "head_dim": rope,
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": key - rope,
        "v_head_dim": value,
        "kv_lora_rank": latent,
        "q_lora_rank": metadata.optional("attention.q_lora_rank") or None,
        # Files leave these out where they change nothing; config.json's defaults are others.
        "norm_topk_prob": bool(metadata.optional("expert_weights_norm")),
        "routed_scaling_factor": metadata.real("expert_weights_scale", 1.0),
    }
    groups = metadata.optional("expert_group_count") or 1
    config |= {"n_group": groups, "topk_group": metadata.optional("expert_group_used_count") or 1}
    if config["model_type"] == "deepseek_v2":
        config["topk_method"] = "group_limited_greedy" if groups > 1 else "greedy"
    else:
        config |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}


def _write(config: Config, dims: Dims, metadata: dict[str, Any], notes: Notes) -> None:
    v3 = config.get("model_type") == "deepseek_v3"
    metadata |= {
        "attention.head_count_kv": 1,
        "attention.key_length": dims["kv_a"],
        "attention.value_length": dims["kv_lora"],
        "attention.key_length_mla": dims["nope"] + dims["rope"],
        "attention.value_length_mla": dims["value"],
        "attention.kv_lora_rank": dims["kv_lora"],
        "expert_gating_func": _SIGMOID if v3 else _SOFTMAX,
    }
    if dims["q_lora"]:
        metadata["attention.q_lora_rank"] = dims["q_lora"]
    if (dims["layers"] in (26, 27)) == bool(dims["q_lora"]):
        raise config.error(
            "q_lora_rank",
            "llama.cpp takes models of 26 or 27 layers to be without q_lora_rank, all others with it",
        )
    groups = config.whole("n_group", default=1)
    if groups > 1:
        metadata |= {"expert_group_count": groups, "expert_group_used_count": config.whole("topk_group", default=1)}
        if not v3:
            notes.append("llama.cpp scores a group by its two best experts, DeepSeek-V2 by its best: results differ")


def _family(model_type: str, class_name: str, gating: int, *fixed: Fixed, norm_topk: bool, scale: float) -> Family:
    return Family(
        arch="deepseek2",
        model_type=model_type,
        class_name=class_name,
        links=_links,
        epsilon_default=1e-6,
        rope=RopeStyle(mla=True),
        fields=(
            Field("expert_count", "n_routed_experts", int, other="num_local_experts"),
            USED,
            Field("expert_shared_count", "n_shared_experts", int),
            Field("expert_feed_forward_length", "moe_intermediate_size", int),
            Field("expert_weights_scale", "routed_scaling_factor", float, scale),
            Field("expert_weights_norm", "norm_topk_prob", bool, norm_topk),
            Field("leading_dense_block_count", "first_k_dense_replace", int, 0),
        ),
        fixed=(SILU, Fixed("moe_layer_freq", 1), Fixed("attention_bias", False), *fixed),
        matches=lambda metadata: (metadata.optional("expert_gating_func") or _SOFTMAX) == gating,
        sizes=_sizes,
        read=_read,
        write=_write,
        knows=(
            "attention.key_length",
            "attention.q_lora_rank",
            "attention.kv_lora_rank",
            "expert_group_count",
        ),
    )


FAMILIES = (
    _family("deepseek_v2", "DeepseekV2ForCausalLM", _SOFTMAX, norm_topk=False, scale=1.0),
    _family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        _SIGMOID,
        Fixed("rope_interleave", True),
        norm_topk=True,
        scale=2.5,
    ),
)
