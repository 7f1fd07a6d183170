"""DeepSeek-V2, V2-Lite, V2.5, Coder-V2: latent attention, and experts of which some see every token.

DeepSeek-AI 2024 (arXiv 2405.04434). Where transformers and the authors' modeling_deepseek.py differ the authors are
followed: ``moe_layer_freq`` counts, and ``norm_topk_prob`` takes the place of the scaling factor. The inner norms have
their own epsilon, 1e-6, whatever ``rms_norm_eps`` says. What the files here share with DeepSeek-V3 is public.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from oarsmith.errors import ModelError
from oarsmith.models.families.base import ConfigReader, Family
from oarsmith.models.families.llama import pre_norm_layer, rms_norm
from oarsmith.models.families.naming import Names
from oarsmith.models.families.parts import decoder, fused, gated_mlp
from oarsmith.models.families.rope import read_rope, rope_mapping
from oarsmith.models.spec import DecoderSpec, LayerSpec
from oarsmith.models.spec_parts import MLA, ExpertGroups, MoE, RMSNormSpec, RouterSpec

_DEFAULTS: dict[str, Any] = {
    "first_k_dense_replace": 0,
    "initializer_range": 0.006,  # section 3.1.2
    "kv_lora_rank": 512,
    "moe_intermediate_size": 1407,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
    "v_head_dim": 128,
}


def latent_attention(read: ConfigReader, pairs: Literal["half", "adjacent"] = "adjacent") -> MLA:
    """Queries through a bottleneck unless ``q_lora_rank`` is null (V2-Lite)."""
    hidden, heads = read.integer("hidden_size"), read.integer("num_attention_heads")
    nope, rope, value = (read.integer(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    latent, bottleneck = read.integer("kv_lora_rank"), read.optional_integer("q_lora_rank")
    bias = read.flag("attention_bias", False)
    narrow = bottleneck is not None
    return MLA(
        num_heads=heads,
        nope_dim=nope,
        rope_dim=rope,
        v_dim=value,
        latent_dim=latent,
        scale=_softmax_scale(read, nope + rope),
        q_down=fused(hidden, ("q_a_proj", bottleneck), bias=bias) if bottleneck is not None else None,
        q_norm=RMSNormSpec(size=bottleneck, eps=1e-6) if bottleneck is not None else None,
        q_up=fused(bottleneck or hidden, ("q_b_proj" if narrow else "q_proj", heads * (nope + rope))),
        kv_down=fused(hidden, ("kv_a_proj_with_mqa", latent + rope), bias=bias),
        kv_norm=RMSNormSpec(size=latent, eps=1e-6),
        kv_up=fused(latent, ("kv_b_proj", heads * (nope + value))),
        out=fused(heads * value, ("o_proj", hidden), bias=bias),
        position=read_rope(read, rope, pairs=pairs),
    )


def _softmax_scale(read: ConfigReader, dim: int) -> float:
    """1 / sqrt(dim), times YaRN's m-scale squared where ``mscale_all_dim`` asks for it on queries and keys alike."""
    scaling = ConfigReader(rope_mapping(read))
    weight = scaling.number("mscale_all_dim", 0.0)
    factor = scaling.number("factor", 1.0)
    mscale = 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
    return float(dim**-0.5 * mscale**2)


def expert_groups(read: ConfigReader, best: int) -> ExpertGroups | None:
    """``n_group`` groups of which ``topk_group`` stay open; one group is none."""
    experts, top_k = read.integer("n_routed_experts"), read.integer("num_experts_per_tok")
    groups, kept = read.integer("n_group", 1), read.integer("topk_group", 1)
    if top_k > experts:
        raise ModelError(f"num_experts_per_tok {top_k} of only {experts} experts", where="config.json")
    if groups == 1:
        return None
    size = experts // groups
    if experts % groups or kept > groups or best > size or top_k > kept * size:
        raise ModelError(
            f"{experts} experts in n_group {groups} groups, topk_group {kept} of them open, cannot give a token {top_k}"
            f" experts (a group scores by its best {best})",
            where="config.json",
        )
    return ExpertGroups(num_groups=groups, kept=kept, best=best)


def layers(read: ConfigReader, mixer: MLA, router: RouterSpec) -> list[LayerSpec]:
    """Dense layers first, then every ``moe_layer_freq``-th with experts."""
    hidden, norm = read.integer("hidden_size"), rms_norm(read)
    activation, inner = read.activation("hidden_act", default="silu"), read.integer("moe_intermediate_size")
    dense = gated_mlp(hidden, read.integer("intermediate_size"), activation)
    num_shared = read.count("n_shared_experts", 0)
    sparse = MoE(
        router=router,
        experts=gated_mlp(hidden, inner, activation, experts=router.num_experts),
        shared=gated_mlp(hidden, inner * num_shared, activation) if num_shared else None,
    )
    first, every = read.count("first_k_dense_replace", 0), read.integer("moe_layer_freq", 1)
    return [
        pre_norm_layer(mixer, sparse if index >= first and index % every == 0 else dense, norm)
        for index in range(read.integer("num_hidden_layers"))
    ]


def only(read: ConfigReader, key: str, *known: str) -> str:
    """The value of ``key``, one of ``known``; the first of them where it is missing or null."""
    value = read.config.get(key)
    if value is None:
        return known[0]
    if value not in known:
        raise ModelError(f"unknown {key} {value!r}", where="config.json", fix=f"known: {', '.join(known)}")
    return str(value)


def build(config: Mapping[str, Any]) -> DecoderSpec:
    read = ConfigReader({**_DEFAULTS, **config})
    only(read, "scoring_func", "softmax")
    limited = only(read, "topk_method", "greedy", "group_limited_greedy") == "group_limited_greedy"
    top_k = read.integer("num_experts_per_tok")
    normalize = read.flag("norm_topk_prob", False) and top_k > 1
    router = RouterSpec(
        num_experts=read.integer("n_routed_experts"),
        top_k=top_k,
        normalize=normalize,
        scale=1.0 if normalize else read.number("routed_scaling_factor"),
        groups=expert_groups(read, best=1) if limited else None,
    )
    return decoder(read, layers(read, latent_attention(read), router), rms_norm(read))


FAMILY = Family(
    name="deepseek_v2",
    model_types=("deepseek_v2",),
    architectures=("DeepseekV2ForCausalLM",),
    build=build,
    tensor_names=Names(q_norm="q_a_layernorm", shared="shared_experts"),
)
