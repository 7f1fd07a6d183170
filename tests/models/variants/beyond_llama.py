"""Dense families whose block or positions differ from Llama's. Name -> (config class, its arguments)."""

from __future__ import annotations

from typing import Any

import transformers

from . import GQA, SIZES, rope

GEMMA = {**GQA, "head_dim": 12, "pad_token_id": 0, "query_pre_attn_scalar": 20, "sliding_window": 6}
GEMMA3_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 7000.0, "factor": 4.0},
}
PHI = {**GQA, "pad_token_id": None}
LONG = {
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.2, 2.0, 4.5, 8.0],
    "original_max_position_embeddings": 16,
}
PARTIAL_LONG = {
    **LONG,
    "short_factor": [1.05, 1.1, 1.2],
    "long_factor": [1.5, 3.0, 6.0],
    "partial_rotary_factor": 0.75,
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 4.0,
    "residual_multiplier": 0.3,
    "attention_multiplier": 0.2,
}
SMOLLM3 = {**GQA, "pad_token_id": None, "num_hidden_layers": 4}
GLM = {**GQA, "pad_token_id": None, "head_dim": 12, "eos_token_id": 2}

VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gemma2": (
        transformers.Gemma2Config,
        {**GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
    ),
    "gemma2_plain": (
        transformers.Gemma2Config,
        {
            **GEMMA,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "hidden_activation": "gelu",
        },
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {**GEMMA, "num_hidden_layers": 7, "rope_parameters": GEMMA3_ROPES},
    ),
    "gemma3_types": (
        transformers.Gemma3TextConfig,
        {
            **GEMMA,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "final_logit_softcapping": 9.0,
            "tie_word_embeddings": False,
        },
    ),
    "phi3": (transformers.Phi3Config, {**PHI, "sliding_window": 6}),
    "phi3_mha_tied": (transformers.Phi3Config, {**SIZES, "pad_token_id": None, "tie_word_embeddings": True}),
    "phi3_long": (
        transformers.Phi3Config,
        {**PHI, "original_max_position_embeddings": 16, **rope("longrope", **LONG)},
    ),
    "phi3_long_partial": (
        transformers.Phi3Config,
        {**PHI, "original_max_position_embeddings": 16, **rope("longrope", **PARTIAL_LONG)},
    ),
    "olmo2": (transformers.Olmo2Config, {**GQA, "pad_token_id": None}),
    "olmo2_mha_bias": (
        transformers.Olmo2Config,
        {**SIZES, "pad_token_id": None, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "granite": (transformers.GraniteConfig, {**GQA, **GRANITE}),
    "granite_bias_tied": (
        transformers.GraniteConfig,
        {**GQA, **GRANITE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "granite_ones": (transformers.GraniteConfig, SIZES),
    "smollm3": (transformers.SmolLM3Config, SMOLLM3),
    "smollm3_sliding": (
        transformers.SmolLM3Config,
        {
            **SMOLLM3,
            "no_rope_layers": [0, 1, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 5,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "starcoder2": (transformers.Starcoder2Config, {**GQA, "sliding_window": 6}),
    "starcoder2_untied": (
        transformers.Starcoder2Config,
        {**GQA, "use_bias": False, "tie_word_embeddings": False, "hidden_act": "gelu"},
    ),
    "cohere": (transformers.CohereConfig, {**GQA, "pad_token_id": None, "logit_scale": 0.4}),
    "cohere_normed": (
        transformers.CohereConfig,
        {
            **GQA,
            "pad_token_id": None,
            "use_qk_norm": True,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "logit_scale": 0.5,
        },
    ),
    "glm": (transformers.GlmConfig, GLM),
    "glm_plain": (
        transformers.GlmConfig,
        {**GLM, "attention_bias": False, "tie_word_embeddings": True, **rope("default", partial_rotary_factor=1.0)},
    ),
    "glm4": (transformers.Glm4Config, GLM),
    "glm4_odd": (
        transformers.Glm4Config,
        {**GLM, "head_dim": 10, "attention_bias": False, **rope("default", partial_rotary_factor=0.6)},
    ),
}
