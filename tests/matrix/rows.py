"""The rows of the support table: every family with one tiny config.json, spelled as the released ones are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parents[1] / "fixtures"
JSON, SENTENCEPIECE = "qwen25_bpe_json", "llama2_spm_legacy"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table.

    Args:
        models: what the line stands for.
        fixture: directory of recorded outputs of the authors' code (tests/fixtures/families).
        native: whether transformers has the model, which then is the oracle.
        tokenizer: recorded ids of the authors' tokenizer: a directory of tests/fixtures/tokenizers, or a case of its
            ``remote`` after a colon.
        kind: where there are none: those of another family whose files are of the same kind.
        gguf: keys that differ for the GGUF column: llama.cpp takes some released sizes only, and leaves out some rules.
        repeated_head: the released files hold the embedding twice, the second time as the head.
    """

    models: str
    config: Mapping[str, Any]
    fixture: str | None = None
    native: bool = True
    tokenizer: str | None = None
    kind: str = JSON
    gguf: Mapping[str, Any] = field(default_factory=dict)
    repeated_head: bool = False


_SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
_GQA = {**_SIZES, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu"}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
_MLA = {
    **_GQA,
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}
_GEMMA = {**_GQA, "head_dim": 16, "tie_word_embeddings": True}


def _native(model_type: str, class_name: str, models: str, *sizes: Mapping[str, Any], **keys: Any) -> Row:
    """``keys`` are the row's fields, and what config.json says beside ``sizes``."""
    config: dict[str, Any] = {"architectures": [class_name], "model_type": model_type}
    for part in sizes or (_GQA,):
        config |= part
    fields = {name: keys.pop(name) for name in ("tokenizer", "kind", "gguf") if name in keys}
    return Row(models=models, config=config | keys, **fields)


def _recorded(models: str, fixture: str, tokenizer: str | None, **more: Any) -> Row:
    config = json.loads((FIXTURES / "families" / fixture / "config.json").read_text(encoding="utf-8"))
    return Row(models=models, config=config, fixture=fixture, native=False, tokenizer=tokenizer, **more)


_BAICHUAN_7B = _recorded("Baichuan 7B", "baichuan_7b", "remote:baichuan_min", gguf={"num_hidden_layers": 32})

ROWS: dict[str, Row] = {
    "llama": _native(
        "llama",
        "LlamaForCausalLM",
        "LLaMA 1 to 3.3, SmolLM, TinyLlama, Yi",
        head_dim=64,
        rope_theta=500000.0,
        rope_scaling={
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        tokenizer="llama2_spm_legacy",
    ),
    "mistral": _native("mistral", "MistralForCausalLM", "Mistral", sliding_window=7, kind=SENTENCEPIECE),
    "mixtral": _native(
        "mixtral",
        "MixtralForCausalLM",
        "Mixtral 8x7B, 8x22B",
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=None,
        kind=SENTENCEPIECE,
    ),
    "qwen": _recorded("Qwen-1", "qwen1_ntk_logn", "qwen1_tiktoken", gguf={"seq_length": 8192}),
    "qwen2": _native(
        "qwen2",
        "Qwen2ForCausalLM",
        "Qwen1.5, Qwen2, Qwen2.5",
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=1,
        gguf={"use_sliding_window": False},
        tie_word_embeddings=True,
        tokenizer="qwen25_bpe_json",
    ),
    "qwen2_moe": _native(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        "Qwen1.5-MoE, Qwen2-57B-A14B",
        _GQA,
        _MOE,
        shared_expert_intermediate_size=24,
        norm_topk_prob=False,
        tokenizer="qwen25_bpe_json",
        use_sliding_window=False,
    ),
    "qwen3": _native("qwen3", "Qwen3ForCausalLM", "Qwen3", head_dim=16, tie_word_embeddings=True),
    "qwen3_moe": _native(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "Qwen3-30B-A3B, 235B-A22B",
        _GQA,
        _MOE,
        head_dim=16,
        norm_topk_prob=True,
        mlp_only_layers=[],
    ),
    "baichuan 7B": _BAICHUAN_7B,
    "baichuan 13B": _recorded("Baichuan 13B", "baichuan_13b", "remote:baichuan_min", gguf={"num_hidden_layers": 40}),
    "baichuan2 7B": Row(
        models="Baichuan 2 7B",
        config={**_BAICHUAN_7B.config, "architectures": ["BaichuanForCausalLM"], "torch_dtype": "bfloat16"},
        native=False,
        tokenizer="baichuan2_spm",
        gguf={"num_hidden_layers": 32},
    ),
    "baichuan2 13B": _recorded("Baichuan 2 13B", "baichuan2_13b", "baichuan2_spm", gguf={"num_hidden_layers": 40}),
    "chatglm": _recorded("ChatGLM-6B", "chatglm_6b", "remote:glm1", repeated_head=True),
    "chatglm2": _recorded("ChatGLM2-6B", "chatglm2_6b", "chatglm2_spm", gguf={"kv_channels": 8}),
    "chatglm3": _recorded("ChatGLM3-6B", "chatglm3_6b", "remote:glm3", gguf={"kv_channels": 8}),
    "bloom": _native(
        "bloom",
        "BloomForCausalLM",
        "BLOOM, BLOOMZ",
        {
            "hidden_size": 36,
            "n_layer": 2,
            "n_head": 6,
            "vocab_size": 320,
            "seq_length": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 3,
            "torch_dtype": "float32",
        },
    ),
    "gpt2": _native(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT-2 and GPT-3 style",
        {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 256, "vocab_size": 320, "torch_dtype": "float32"},
        tokenizer="gpt2_vocab_merges",
        bos_token_id=1,
        eos_token_id=2,
    ),
    "opt": _native(
        "opt",
        "OPTForCausalLM",
        "OPT, Galactica",
        {key: value for key, value in _SIZES.items() if key != "intermediate_size"},
        ffn_dim=48,
        word_embed_proj_dim=32,
        do_layer_norm_before=True,
        activation_function="relu",
        tie_word_embeddings=True,
        pad_token_id=1,
        kind="gpt2_vocab_merges",
        bos_token_id=2,
    ),
    "gemma": _native("gemma", "GemmaForCausalLM", "Gemma 1", _GEMMA, hidden_act="gelu", kind=SENTENCEPIECE),
    "gemma2": _native(
        "gemma2",
        "Gemma2ForCausalLM",
        "Gemma 2",
        _GEMMA,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=12,
        gguf={"query_pre_attn_scalar": 16},
        sliding_window=7,
        kind=SENTENCEPIECE,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
    "gemma3_text": _native(
        "gemma3_text",
        "Gemma3ForCausalLM",
        "Gemma 3 (text)",
        {key: value for key, value in _GEMMA.items() if key != "hidden_act"},
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=12,
        gguf={"query_pre_attn_scalar": 16, "sliding_window_pattern": 6},
        sliding_window=7,
        kind=SENTENCEPIECE,
        sliding_window_pattern=2,
        rope_theta=1000000.0,
        rope_local_base_freq=10000.0,
    ),
    "yuan": _recorded("Yuan 2", "yuan2_2b", None, kind=SENTENCEPIECE),
    "deepseek_v2": _native(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        "DeepSeek-V2, V2-Lite, V2.5",
        _MLA,
        q_lora_rank=None,
        n_shared_experts=2,
        topk_method="greedy",
        gguf={"num_hidden_layers": 27},
        scoring_func="softmax",
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        n_group=1,
        topk_group=1,
    ),
    "deepseek_v3": _native(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        "DeepSeek-V3, R1",
        _MLA,
        q_lora_rank=20,
        n_shared_experts=1,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        n_group=4,
        topk_group=2,
        num_nextn_predict_layers=1,
    ),
    "glm": _native("glm", "GlmForCausalLM", "GLM-4-9B", head_dim=8, partial_rotary_factor=0.5, attention_bias=True),
    "glm4": _native(
        "glm4", "Glm4ForCausalLM", "GLM-4-0414, GLM-Z1", head_dim=8, partial_rotary_factor=0.5, attention_bias=True
    ),
    "phi3": _native(
        "phi3",
        "Phi3ForCausalLM",
        "Phi-3, Phi-4-mini",
        original_max_position_embeddings=32,
        rope_scaling={
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
        },
        sliding_window=19,
    ),
    "gpt_oss": _native(
        "gpt_oss",
        "GptOssForCausalLM",
        "gpt-oss 20B, 120B",
        head_dim=12,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=7,
        swiglu_limit=7.0,
        attention_bias=True,
        layer_types=["sliding_attention", "full_attention"],
        rope_scaling={
            "rope_type": "yarn",
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 32,
            "truncate": False,
        },
    ),
    "olmo2": _native("olmo2", "Olmo2ForCausalLM", "OLMo 2"),
    "granite": _native(
        "granite",
        "GraniteForCausalLM",
        "Granite 3",
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
    ),
    "starcoder2": _native(
        "starcoder2",
        "Starcoder2ForCausalLM",
        "StarCoder2",
        {key: value for key, value in _GQA.items() if key != "rms_norm_eps"},
        hidden_act="gelu_pytorch_tanh",
        norm_epsilon=1e-5,
        use_bias=True,
        sliding_window=7,
        tie_word_embeddings=True,
    ),
    "falcon": _native(
        "falcon",
        "FalconForCausalLM",
        "Falcon 7B, RW, Falcon2 11B",
        {key: value for key, value in _SIZES.items() if key != "intermediate_size"},
        alibi=False,
        bias=False,
        multi_query=True,
        parallel_attn=True,
        new_decoder_architecture=False,
        tie_word_embeddings=True,
    ),
    "falcon 40B": _native(
        "falcon",
        "FalconForCausalLM",
        "Falcon 40B, 180B",
        {key: value for key, value in _SIZES.items() if key != "intermediate_size"},
        alibi=False,
        bias=False,
        num_kv_heads=2,
        parallel_attn=True,
        new_decoder_architecture=True,
        tie_word_embeddings=True,
    ),
    "internlm2": _recorded("InternLM2, InternLM2.5", "internlm2", "remote:internlm2_map"),
    "cohere": _native(
        "cohere",
        "CohereForCausalLM",
        "Command R, R+, Aya",
        {key: value for key, value in _GQA.items() if key != "rms_norm_eps"},
        layer_norm_eps=1e-5,
        logit_scale=0.25,
        use_qk_norm=True,
        gguf={"use_qk_norm": False},
        tie_word_embeddings=True,
    ),
    "gpt_neox": _native(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        "GPT-NeoX 20B, Pythia",
        _SIZES,
        rotary_pct=0.5,
        rotary_emb_base=10000,
        use_parallel_residual=True,
    ),
    "smollm3": _native(
        "smollm3",
        "SmolLM3ForCausalLM",
        "SmolLM3",
        no_rope_layers=[1, 0],
        no_rope_layer_interval=4,
        gguf={"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
        use_sliding_window=False,
        tie_word_embeddings=True,
    ),
}
