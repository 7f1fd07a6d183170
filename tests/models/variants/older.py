"""BLOOM, OPT and Falcon. Name -> (config class, its arguments)."""

from __future__ import annotations

from typing import Any

import transformers

from . import SIZES, rope

BLOOM = {"vocab_size": 101, "hidden_size": 32, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
OPT = {key: value for key, value in SIZES.items() if key != "intermediate_size"} | {"ffn_dim": 40}
FALCON = {key: value for key, value in SIZES.items() if key != "intermediate_size"}

VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt_neox": (transformers.GPTNeoXConfig, {**SIZES, "rotary_pct": 0.25}),
    "gpt_neox_sequential": (
        transformers.GPTNeoXConfig,
        {**SIZES, "use_parallel_residual": False, "attention_bias": False, "rotary_pct": 1.0, "rotary_emb_base": 500},
    ),
    "bloom": (transformers.BloomConfig, BLOOM),
    # Six heads: the last two slopes are those between the first ones.
    "bloom_post_untied": (
        transformers.BloomConfig,
        {
            **BLOOM,
            "hidden_size": 48,
            "n_head": 6,
            "apply_residual_connection_post_layernorm": True,
            "tie_word_embeddings": False,
            "layer_norm_epsilon": 1e-3,
        },
    ),
    "opt": (transformers.OPTConfig, OPT),
    "opt_350m": (transformers.OPTConfig, {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "opt_early": (
        transformers.OPTConfig,
        {**OPT, "_remove_final_layer_norm": True, "activation_function": "gelu", "tie_word_embeddings": False},
    ),
    "opt_bare": (
        transformers.OPTConfig,
        {**OPT, "enable_bias": False, "layer_norm_elementwise_affine": False, "pad_token_id": None},
    ),
    "falcon_7b": (transformers.FalconConfig, FALCON),
    "falcon_7b_linear": (
        transformers.FalconConfig,
        {**FALCON, "bias": True, "num_kv_heads": 4, "ffn_hidden_size": 40, **rope("linear", factor=2.0)},
    ),
    "falcon_40b": (transformers.FalconConfig, {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_11b": (
        transformers.FalconConfig,
        {
            **FALCON,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "tie_word_embeddings": False,
        },
    ),
    "falcon_rw": (
        transformers.FalconConfig,
        {
            **FALCON,
            "hidden_size": 48,
            "num_attention_heads": 6,
            "alibi": True,
            "bias": True,
            "multi_query": False,
            "parallel_attn": False,
        },
    ),
    "falcon_alibi_shared": (transformers.FalconConfig, {**FALCON, "alibi": True, "parallel_attn": False}),
    "falcon_sequential": (transformers.FalconConfig, {**FALCON, "multi_query": False, "parallel_attn": False}),
}
