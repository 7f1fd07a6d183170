"""The Llama line: dense decoders that differ in arguments, and GPT-2. Name -> (config class, its arguments)."""

from __future__ import annotations

from typing import Any

import transformers

from . import GPT2, GQA, SIZES, rope

VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, SIZES),
    "llama_gqa_head_dim": (transformers.LlamaConfig, {**GQA, "head_dim": 12, "rms_norm_eps": 1e-3}),
    "llama_bias_tied": (
        transformers.LlamaConfig,
        {**GQA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama_gelu": (transformers.LlamaConfig, {**GQA, "hidden_act": "gelu"}),
    "llama_linear": (transformers.LlamaConfig, {**GQA, **rope("linear", factor=4.0)}),
    "llama_dynamic": (
        transformers.LlamaConfig,
        {**GQA, "max_position_embeddings": 16, **rope("dynamic", factor=2.0)},
    ),
    "llama_llama3": (
        transformers.LlamaConfig,
        {
            **GQA,
            "head_dim": 16,
            **rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
        },
    ),
    "llama_yarn": (
        transformers.LlamaConfig,
        {**GQA, "head_dim": 16, **rope("yarn", factor=4.0, original_max_position_embeddings=16)},
    ),
    "llama_yarn_all": (
        transformers.LlamaConfig,
        {
            **GQA,
            **rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=16,
                beta_fast=8.0,
                beta_slow=2.0,
                mscale=0.7,
                mscale_all_dim=1.2,
                truncate=False,
            ),
        },
    ),
    "mistral": (transformers.MistralConfig, {**GQA, "sliding_window": 7}),
    "mistral_full": (transformers.MistralConfig, {**GQA, "sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, GQA),
    "qwen2_sliding": (
        transformers.Qwen2Config,
        {**GQA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "tie_word_embeddings": True},
    ),
    "qwen3": (transformers.Qwen3Config, {**GQA, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_bias": (transformers.Qwen3Config, {**GQA, "head_dim": 8, "attention_bias": True}),
    "gemma": (transformers.GemmaConfig, {**GQA, "head_dim": 12}),
    "gpt2": (transformers.GPT2Config, GPT2),
    "gpt2_inverse": (
        transformers.GPT2Config,
        {**GPT2, "scale_attn_by_inverse_layer_idx": True, "n_inner": 50, "tie_word_embeddings": False},
    ),
    "gpt2_unscaled": (
        transformers.GPT2Config,
        {**GPT2, "scale_attn_weights": False, "activation_function": "relu"},
    ),
}
