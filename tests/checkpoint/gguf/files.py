"""Tiny GGUF files for tests, written from random transformers models the way llama.cpp's convert_hf_to_gguf.py does.

That these files mean what llama.cpp takes them to mean is tested by running them in llama.cpp (test_convert.py).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from oarsmith.checkpoint.gguf.pretokenizers import PRE_TOKENIZERS

F32 = gguf.GGMLQuantizationType.F32
_TEXT = [
    "The capital of France is Paris, isn't it? We'll see in 2024, 12345 times.",
    "  spaces   and\ttabs\n\nnew lines \r\n and ümläuts, 漢字 and 😀 emoji's don't break it",
    "hello hello world the there then other another mother brother capital city of the world",
] * 4
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
COMMON = {**SIZES, "vocab_size": 320, "max_position_embeddings": 128, "tie_word_embeddings": False}


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_type": kind, **values}


CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**COMMON, rope_theta=500000.0, rms_norm_eps=1e-5),
    "llama-tied-bias": transformers.LlamaConfig(
        **COMMON | {"tie_word_embeddings": True}, attention_bias=True, mlp_bias=True
    ),
    "llama-linear": transformers.LlamaConfig(**COMMON, rope_scaling=rope("linear", factor=4.0)),
    "llama-yarn": transformers.LlamaConfig(
        **COMMON, rope_scaling=rope("yarn", factor=4.0, original_max_position_embeddings=32)
    ),
    "llama-llama3": transformers.LlamaConfig(
        **COMMON,
        head_dim=32,
        rope_theta=500000.0,
        rope_scaling=rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=256
        ),
    ),
    "mistral": transformers.MistralConfig(**COMMON, sliding_window=8),
    "qwen2": transformers.Qwen2Config(**COMMON, rope_theta=1e6),
    "qwen3": transformers.Qwen3Config(**COMMON, head_dim=32, rope_theta=1e6),
    "gemma": transformers.GemmaConfig(**COMMON | {"tie_word_embeddings": True}, head_dim=32),
    "gpt2": transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, vocab_size=320),
}
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gpt2": "gpt2",
}


def tiny_model(name: str, **changes: Any) -> Any:
    """A float32 model with every parameter random: also norms and biases, which are 1 and 0 in a fresh model."""
    config = CONFIGS[name].__class__(**CONFIGS[name].to_dict() | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(std=0.1)
            if key.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")):
                parameter.add_(0.0 if name == "gemma" else 1.0)
    return model


def byte_level_tokens(vocab_size: int = 300) -> tuple[list[str], list[str]]:
    """Tokens (three special ones first) and merges of a small byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    vocab = tokenizer.get_vocab()
    return sorted(vocab, key=lambda token: vocab[token]), merges


def add_byte_level_tokenizer(writer: gguf.GGUFWriter, *, pre: str | None = "gpt-2", num_rows: int = 0) -> None:
    """Add a vocabulary of 300, padded to `num_rows` as llama.cpp does where the embedding has more rows."""
    tokens, merges = byte_level_tokens()
    padding = [f"[PAD{index}]" for index in range(len(tokens), num_rows)]
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens + padding)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3) + [5] * len(padding))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)


def save_tokenizer(directory: Path, *, pre: str = "gpt-2") -> None:
    """tokenizer.json and its config for the vocabulary of `byte_level_tokens`."""
    tokens, merges = byte_level_tokens()
    known = PRE_TOKENIZERS[pre]
    pairs = [tuple(merge.split(" ")) for merge in merges]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=known.ignore_merges))
    tokenizer.pre_tokenizer = known.build()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:3])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def save_directory(model: Any, directory: Path) -> Path:
    """A transformers model with a tokenizer, as a model directory."""
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def random_model(config: transformers.PretrainedConfig) -> Any:
    """A float32 model of any native family, every parameter random; norms around the value that means 1."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    shifted = "gemma" in config.model_type  # these norms are stored less 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1)
            if parameter.dim() == 1 and name.endswith("weight") and not shifted:
                parameter.add_(1.0)
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.normal_(std=0.1)
    return model


def llama_cpp_logits(path: Path, input_ids: torch.Tensor) -> torch.Tensor:
    """What llama.cpp computes from the file: [T, V]."""
    llama_cpp = pytest.importorskip("llama_cpp")
    llama = llama_cpp.Llama(
        model_path=str(path), verbose=False, logits_all=True, n_ctx=64, n_threads=1, flash_attn=False
    )
    llama.eval(input_ids[0].tolist())
    logits = torch.from_numpy(np.array(llama.scores[: input_ids.shape[1]]))
    llama.close()
    return logits


def _permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    rows = weight.shape[0]
    return weight.reshape(num_heads, 2, rows // num_heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _llama3_factors(config: Any) -> np.ndarray:
    """As convert_hf_to_gguf.py writes them."""
    scaling = config.rope_parameters
    low = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
    high = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
    factors = []
    for index in range(0, config.head_dim, 2):
        wavelength = 2 * math.pi * scaling["rope_theta"] ** (index / config.head_dim)
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(scaling["factor"])
        else:
            smooth = (scaling["original_max_position_embeddings"] / wavelength - scaling["low_freq_factor"]) / (
                scaling["high_freq_factor"] - scaling["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def _add_config(writer: gguf.GGUFWriter, config: Any, architecture: str) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_context_length(config.max_position_embeddings)
    if architecture == "gpt2":
        writer.add_feed_forward_length(4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    scaling = config.rope_parameters
    writer.add_rope_freq_base(scaling["rope_theta"])
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    if scaling["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
    if scaling["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if scaling["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(config))
    if config.model_type == "mistral":
        writer.add_sliding_window(config.sliding_window)


def write_gguf(
    model: Any,
    path: Path,
    *,
    quantization: gguf.GGMLQuantizationType = F32,
    pre: str | None = "gpt-2",
    store_tied_head: bool = False,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write `model` as llama.cpp's converter would; matrices in `quantization`, the rest in float32.

    `extra` adds metadata: int, float, bool or str values by full key.
    """
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    _add_config(writer, config, architecture)
    add_byte_level_tokenizer(writer, pre=pre, num_rows=config.vocab_size)
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in (extra or {}).items():
        adders[type(value)](key, value)
    arch_id = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(arch_id, config.num_hidden_layers)
    for key, parameter in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings and not store_tied_head:
            continue
        data = parameter.float().numpy()
        if architecture == "llama" and ".q_proj." in key:
            data = _permute(data, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in key:
            data = _permute(data, config.num_key_value_heads)
        if architecture == "gemma" and key.endswith("norm.weight"):
            data = data + 1
        if architecture == "gpt2" and key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            data = data.T
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None, key
        kind = quantization if data.ndim > 1 and "position" not in name else F32
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(data), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
