"""PaddleNLP's ``config.json`` from and to the Hugging Face one: the few keys that differ, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oarsmith.checkpoint.paddle.names import FAMILIES, paddle_family
from oarsmith.errors import CheckpointError

# Hugging Face key -> PaddleNLP key, by PaddleNLP model_type.
_KEYS: Mapping[str, Mapping[str, str]] = {
    "gpt": {
        "n_positions": "max_position_embeddings",
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "activation_function": "hidden_activation",
        "layer_norm_epsilon": "layer_norm_eps",
        "resid_pdrop": "hidden_dropout_prob",
        "attn_pdrop": "attention_probs_dropout_prob",
    },
    "opt": {
        "ffn_dim": "intermediate_size",
        "activation_function": "hidden_act",
        "do_layer_norm_before": "normalize_before",
        "dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
    },
    "chatglm": {"num_layers": "num_hidden_layers"},
    "chatglm_v2": {
        "num_layers": "num_hidden_layers",
        "padded_vocab_size": "vocab_size",
        "seq_length": "max_sequence_length",
    },
}
_ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "qwen": "QWenLMHeadModel",
    "chatglm": "ChatGLMModel",
    "chatglm_v2": "ChatGLMModel",
    "baichuan": "BaichuanForCausalLM",
}
# What PaddleNLP's trainer and kernels leave in the file; it means nothing outside of them.
_PADDLE_ONLY = (
    "paddlenlp_version",
    "fuse_attention_qkv",
    "fuse_attention_ffn",
    "tensor_parallel_degree",
    "tensor_parallel_rank",
    "tensor_parallel_output",
    "sequence_parallel",
    "use_flash_attention",
    "use_fused_rms_norm",
    "use_fused_rope",
    "recompute_granularity",
    "virtual_pp_degree",
    "long_sequence_strategy_type",
    "long_sequence_strategy_name",
    "long_sequence_init_args",
    "use_long_sequence_strategies",
    "use_flash_attention_for_generation",
    "use_last_token_for_generation",
    "immediate_clear_past_key_value",
)


def to_paddle_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """PaddleNLP's config of a Hugging Face one; ``dtype`` is that of the weights (``bfloat16``)."""
    family = paddle_family(config)
    keys = _KEYS.get(family.model_type, {})
    skipped = {"torch_dtype", "dtype", "transformers_version", "auto_map", "quantization_config"}
    found = {keys.get(key, key): value for key, value in config.items() if key not in skipped}
    found |= {"model_type": family.model_type, "architectures": [family.architecture], "dtype": dtype}
    if family.model_type == "gpt":
        found["intermediate_size"] = found.get("intermediate_size") or 4 * int(found["hidden_size"])
        found["hidden_activation"] = _gpt_activation(str(found.get("hidden_activation") or "gelu_new"))
    scaling = config.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) == "linear":
        found |= {"rope_scaling_type": "linear", "rope_scaling_factor": scaling["factor"]}
    if config.get("model_type") == "baichuan":
        # Only the 7B models say max_position_embeddings; the 13B ones have ALiBi.
        found["alibi"] = "max_position_embeddings" not in config
        found["max_position_embeddings"] = config.get("max_position_embeddings", config.get("model_max_length", 4096))
    return found


def from_paddle_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The Hugging Face config of PaddleNLP's.

    Raises:
        CheckpointError: a model type PaddleNLP does not have, or an option that Hugging Face models have not.
    """
    kind = config.get("model_type")
    names = [name for name, family in FAMILIES.items() if family.model_type == kind]
    if not names:
        raise CheckpointError(f"no PaddleNLP model of type {kind!r} is known here", where="config.json: model_type")
    name = "baichuan" if kind == "llama" and config.get("alibi") else names[0]
    keys = {theirs: ours for ours, theirs in _KEYS.get(str(kind), {}).items()}
    found = {keys.get(key, key): value for key, value in config.items() if key not in _PADDLE_ONLY}
    found["model_type"] = "chatglm" if name == "chatglm_v2" else name
    found["architectures"] = [_ARCHITECTURES.get(name, FAMILIES[name].architecture)]
    found["torch_dtype"] = found.pop("dtype", None) or "float32"
    if kind == "gpt":
        activation = found.get("activation_function") or "gelu"
        found["activation_function"] = "gelu_new" if activation == "gelu" else activation
    if name == "baichuan":
        found.setdefault("model_max_length", found.pop("max_position_embeddings", 4096))
    found.pop("alibi", None)
    _rope(found)
    return found


def _gpt_activation(name: str) -> str:
    """PaddleNLP's "gelu" is the tanh approximation; the exact one it does not have."""
    if name == "gelu":
        raise CheckpointError("PaddleNLP's GPT has no exact GELU", where="config.json: activation_function")
    return "gelu" if name in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast") else name


def _rope(found: dict[str, Any]) -> None:
    """``rope_scaling_type`` and ``rope_scaling_factor`` as ``rope_scaling``."""
    kind, factor = found.pop("rope_scaling_type", None), found.pop("rope_scaling_factor", 1.0)
    if kind is None or found.get("rope_scaling"):
        return
    known = {"linear": "linear", "dynamic_ntk": "dynamic"}
    if kind not in known:
        raise CheckpointError(
            f"rope_scaling_type {kind!r} has no counterpart outside of PaddleNLP",
            where="config.json",
            fix=f"known: {', '.join(known)}",
        )
    found["rope_scaling"] = {"type": known[kind], "rope_type": known[kind], "factor": factor}
