"""DeepSeek-V2 and V3 (latent attention), gpt-oss (sinks, stacked experts). Name -> (config class, its arguments)."""

from __future__ import annotations

from typing import Any

import transformers

from . import GQA, SIZES, rope

_MLA = {
    **SIZES,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.707, "mscale_all_dim": 0.707}
_V3 = {**_MLA, "n_group": 4, "topk_group": 2}
_GPT_OSS = {**GQA, "head_dim": 12, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5}

VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "deepseek_v2_lite": (
        transformers.DeepseekV2Config,
        {**_MLA, "q_lora_rank": None, "n_shared_experts": 2, **rope("yarn", **_YARN)},
    ),
    "deepseek_v2": (
        transformers.DeepseekV2Config,
        {
            **_MLA,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.0,
            "attention_bias": True,
            "rms_norm_eps": 1e-3,
            "first_k_dense_replace": 0,
            **rope("yarn", **{**_YARN, "mscale": 1.0}),
        },
    ),
    "deepseek_v3": (transformers.DeepseekV3Config, {**_V3, **rope("yarn", **_YARN)}),
    "deepseek_v3_plain": (
        transformers.DeepseekV3Config,
        {
            **_MLA,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
        },
    ),
    "deepseek_v3_half": (transformers.DeepseekV3Config, {**_V3, "rope_interleave": False, "attention_bias": True}),
    "gpt_oss": (
        transformers.GptOssConfig,
        {
            **_GPT_OSS,
            **rope("yarn", factor=4.0, original_max_position_embeddings=16, truncate=False),
            "swiglu_limit": 0.5,
        },
    ),
    "gpt_oss_plain": (
        transformers.GptOssConfig,
        {
            **_GPT_OSS,
            **rope("default"),
            "attention_bias": False,
            "swiglu_alpha": 1.1,
            "tie_word_embeddings": True,
        },
    ),
}
