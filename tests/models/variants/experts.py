"""Mixtures of experts with a softmax router: Mixtral and the Qwen line. Name -> (config class, its arguments)."""

from __future__ import annotations

from typing import Any

import transformers

from . import GQA

QWEN2 = {
    **GQA,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 28,
    "num_experts": 6,
    "num_experts_per_tok": 3,
}
QWEN3 = {**GQA, "head_dim": 12, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}

VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixtral": (transformers.MixtralConfig, {**GQA, "num_local_experts": 4}),
    "mixtral_sliding": (
        transformers.MixtralConfig,
        {**GQA, "num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 6, "head_dim": 10},
    ),
    "qwen2_moe": (transformers.Qwen2MoeConfig, QWEN2),
    "qwen2_moe_mixed": (
        transformers.Qwen2MoeConfig,
        {**QWEN2, "norm_topk_prob": True, "qkv_bias": False, "decoder_sparse_step": 2, "tie_word_embeddings": True},
    ),
    "qwen2_moe_sliding": (
        transformers.Qwen2MoeConfig,
        {**QWEN2, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": (transformers.Qwen3MoeConfig, QWEN3),
    "qwen3_moe_mixed": (
        transformers.Qwen3MoeConfig,
        {**QWEN3, "norm_topk_prob": True, "attention_bias": True, "mlp_only_layers": [0], "tie_word_embeddings": True},
    ),
    "qwen3_moe_sliding": (
        transformers.Qwen3MoeConfig,
        {**QWEN3, "use_sliding_window": True, "sliding_window": 5, "decoder_sparse_step": 3},
    ),
}
