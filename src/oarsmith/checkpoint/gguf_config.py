"""config.json and generation_config.json from GGUF metadata."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from oarsmith.checkpoint.gguf_metadata import Metadata, ModelSizes
from oarsmith.checkpoint.gguf_rope import rope_scaling
from oarsmith.errors import CheckpointError


def _rotary(metadata: Metadata, sizes: ModelSizes) -> dict[str, Any]:
    base = metadata.real("rope.freq_base", 10000.0)
    config: dict[str, Any] = {
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.ffn,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head,
        "max_position_embeddings": sizes.context,
        "rms_norm_eps": metadata.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": base,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
    }
    scaling = rope_scaling(metadata, base=base, head=sizes.head)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config


def _llama(metadata: Metadata, sizes: ModelSizes) -> dict[str, Any]:
    tensors = metadata.file.tensors
    window = metadata.optional("attention.sliding_window")
    if window:
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window} | _rotary(
            metadata, sizes
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
    } | _rotary(metadata, sizes)


def _qwen2(metadata: Metadata, sizes: ModelSizes) -> dict[str, Any]:
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False} | _rotary(
        metadata, sizes
    )


def _qwen3(metadata: Metadata, sizes: ModelSizes) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": "blk.0.attn_q.bias" in metadata.file.tensors,
        "use_sliding_window": False,
    } | _rotary(metadata, sizes)


def _gemma(metadata: Metadata, sizes: ModelSizes) -> dict[str, Any]:
    config = {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"} | _rotary(metadata, sizes)
    return config | {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}


def _gpt2(metadata: Metadata, sizes: ModelSizes) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_positions": sizes.context,
        "n_ctx": sizes.context,
        "n_embd": sizes.hidden,
        "n_layer": sizes.layers,
        "n_head": sizes.heads,
        "n_inner": sizes.ffn,
        "layer_norm_epsilon": metadata.real("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


_CONFIGS: Mapping[str, Callable[[Metadata, ModelSizes], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gpt2": _gpt2,
}


def build_config(
    metadata: Metadata, sizes: ModelSizes, *, tied: bool, dtype: torch.dtype, special_ids: Mapping[str, int]
) -> dict[str, Any]:
    """The model's config.json.

    Args:
        tied: the output head is the embedding.
        special_ids: ``bos``, ``eos``, ``pad``, where the file has them.

    Raises:
        CheckpointError: unknown architecture, or metadata that the family's config cannot express.
    """
    if metadata.architecture not in _CONFIGS:
        raise unknown_architecture(metadata)
    return (
        _CONFIGS[metadata.architecture](metadata, sizes)
        | {"vocab_size": sizes.vocab, "tie_word_embeddings": tied, "torch_dtype": str(dtype).removeprefix("torch.")}
        | {f"{role}_token_id": special_ids.get(role) for role in ("bos", "eos", "pad")}
    )


def unknown_architecture(metadata: Metadata) -> CheckpointError:
    """The error for a GGUF architecture without a config here."""
    return CheckpointError(
        f"unknown GGUF architecture {metadata.architecture!r}; known are {', '.join(_CONFIGS)}",
        where=str(metadata.file.path),
        fix="convert from the model's Hugging Face directory instead",
    )
