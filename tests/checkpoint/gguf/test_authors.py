"""Families whose code is their authors': ChatGLM2, Qwen-1, InternLM2, Baichuan.

Each computes what a native family computes from the same numbers under other names, so transformers is the oracle.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from oarsmith.checkpoint.gguf.convert import convert_gguf
from oarsmith.checkpoint.gguf.write import write_gguf
from oarsmith.errors import CheckpointError

from .files import llama_cpp_logits, random_model, save_tokenizer
from .test_families import COMMON, INPUT_IDS

T = transformers
Tensors = dict[str, torch.Tensor]
MHA = COMMON | {"num_key_value_heads": 4}
BAICHUAN = {key: COMMON[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")} | {
    "model_type": "baichuan",
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def renamed(tensors: Tensors, names: Sequence[tuple[str, str]]) -> Tensors:
    result = {}
    for key, tensor in tensors.items():
        for old, new in names:
            key = key.replace(old, new)
        result[key] = tensor
    return result


def take_qkv(tensors: Tensors, layer: int, suffix: str) -> list[torch.Tensor]:
    return [tensors.pop(f"model.layers.{layer}.self_attn.{part}_proj.{suffix}") for part in "qkv"]


def chatglm() -> tuple[Any, dict[str, Any], Tensors]:
    model = random_model(T.GlmConfig(**COMMON, head_dim=16, rms_norm_eps=1e-5))
    tensors: Tensors = dict(model.state_dict())
    fused = {
        f"transformer.encoder.layers.{layer}.self_attention.query_key_value.{suffix}": torch.cat(
            take_qkv(tensors, layer, suffix)
        )
        for layer in range(2)
        for suffix in ("weight", "bias")
    }
    names = [
        ("model.layers", "transformer.encoder.layers"),
        ("self_attn.o_proj", "self_attention.dense"),
        ("mlp.gate_up_proj", "mlp.dense_h_to_4h"),
        ("mlp.down_proj", "mlp.dense_4h_to_h"),
        ("model.norm", "transformer.encoder.final_layernorm"),
        ("model.embed_tokens", "transformer.embedding.word_embeddings"),
        ("lm_head", "transformer.output_layer"),
    ]
    config = {
        "model_type": "chatglm",
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_layers": 2,
        "num_attention_heads": 4,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "kv_channels": 16,
        "padded_vocab_size": 320,
        "seq_length": 128,
        "layernorm_epsilon": 1e-5,
        "add_qkv_bias": True,
        "add_bias_linear": False,
    }
    inv_freq = {"transformer.rotary_pos_emb.inv_freq": torch.ones(4)}  # files carry it; it says nothing
    return model, config, fused | renamed(tensors, names) | inv_freq


def qwen() -> tuple[Any, dict[str, Any], Tensors]:
    model = random_model(T.Qwen2Config(**MHA, rope_theta=20000.0))
    tensors: Tensors = dict(model.state_dict())
    fused = {
        f"transformer.h.{layer}.attn.c_attn.{suffix}": torch.cat(take_qkv(tensors, layer, suffix))
        for layer in range(2)
        for suffix in ("weight", "bias")
    }
    names = [
        ("model.layers", "transformer.h"),
        ("self_attn.o_proj", "attn.c_proj"),
        ("mlp.gate_proj", "mlp.w2"),
        ("mlp.up_proj", "mlp.w1"),
        ("mlp.down_proj", "mlp.c_proj"),
        ("model.norm", "transformer.ln_f"),
        ("model.embed_tokens", "transformer.wte"),
        ("input_layernorm", "ln_1"),
        ("post_attention_layernorm", "ln_2"),
    ]
    config = {
        "model_type": "qwen",
        "hidden_size": 64,
        "intermediate_size": 192,  # twice the real width
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "kv_channels": 16,
        "vocab_size": 320,
        "seq_length": 128,
        "max_position_embeddings": 128,
        "layer_norm_epsilon": 1e-6,
        "rotary_emb_base": 20000,
        "no_bias": True,
        "tie_word_embeddings": False,
    }
    return model, config, fused | renamed(tensors, names)


def internlm2() -> tuple[Any, dict[str, Any], Tensors]:
    model = random_model(T.LlamaConfig(**COMMON))
    tensors: Tensors = dict(model.state_dict())
    fused = {}
    for layer in range(2):
        q, k, v = (part.reshape(2, -1, 16, 64) for part in take_qkv(tensors, layer, "weight"))
        fused[f"model.layers.{layer}.attention.wqkv.weight"] = torch.cat([q, k, v], dim=1).reshape(-1, 64)
    names = [
        ("self_attn.o_proj", "attention.wo"),
        ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.up_proj", "feed_forward.w3"),
        ("mlp.down_proj", "feed_forward.w2"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("embed_tokens", "tok_embeddings"),
        ("lm_head", "output"),
    ]
    config = COMMON | {"model_type": "internlm2", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu"}
    return model, config | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, fused | renamed(tensors, names)


def baichuan(layers: int, **values: Any) -> tuple[Any, dict[str, Any], Tensors]:
    # A rotary embedding whose positions are all near 0 leaves room for ALiBi, which comes in with the mask.
    scaling = {"rope_type": "linear", "factor": 1e9, "rope_theta": 1e4} if layers == 40 else None
    model = random_model(T.LlamaConfig(**MHA | {"num_hidden_layers": layers}, rope_parameters=scaling))
    tensors: Tensors = dict(model.state_dict())
    packed = {
        f"model.layers.{layer}.self_attn.W_pack.weight": torch.cat(take_qkv(tensors, layer, "weight"))
        for layer in range(layers)
    }
    length = {"model_max_length": 128} if layers == 40 else {"max_position_embeddings": 128}
    return model, BAICHUAN | length | {"num_hidden_layers": layers} | values, packed | tensors


def alibi(num_heads: int, length: int) -> torch.Tensor:
    """Causal mask with ALiBi for a power of two heads: [1, H, T, T]."""
    slopes = torch.tensor([2.0 ** (-8 * (head + 1) / num_heads) for head in range(num_heads)])
    distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    return (slopes[:, None, None] * distance).masked_fill(distance > 0, float("-inf"))[None]


def save(directory: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    directory.mkdir()
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    save_tokenizer(directory)
    return directory


CASES = {
    "chatglm": chatglm,
    "qwen": qwen,
    "internlm2": internlm2,
    "baichuan-7b": lambda: baichuan(32, architectures=["BaiChuanForCausalLM"]),
    "baichuan-13b": lambda: baichuan(40),
}


@pytest.mark.usefixtures("few_threads")
@pytest.mark.parametrize("name", CASES)
def test_both_ways(name: str, tmp_path: Path) -> None:
    model, config, tensors = CASES[name]()
    write_gguf(save(tmp_path / "hf", config, tensors), tmp_path / "m.gguf", type="f32")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == {key for key in tensors if "inv_freq" not in key}
    for key, tensor in back.items():
        assert torch.equal(tensor, tensors[key]), key
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    told_otherwise = {"rope_scaling", "architectures"}
    for key in config.keys() - told_otherwise:
        assert written[key] == config[key], key
    mask = alibi(4, INPUT_IDS.shape[1]) if name == "baichuan-13b" else None
    with torch.no_grad():
        expected = model(INPUT_IDS, attention_mask=mask).logits[0]
    # llama.cpp keeps its cache in float16.
    torch.testing.assert_close(llama_cpp_logits(tmp_path / "m.gguf", INPUT_IDS), expected, rtol=0, atol=2e-2)


@pytest.mark.usefixtures("few_threads")
def test_baichuan_2_has_its_head_normalised(tmp_path: Path) -> None:
    model, config, tensors = baichuan(32, architectures=["BaichuanForCausalLM"])
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.nn.functional.normalize(model.lm_head.weight))
        expected = model(INPUT_IDS).logits[0]
    report = write_gguf(save(tmp_path / "hf", config, tensors), tmp_path / "m.gguf", type="f32")
    assert "length 1" in report.notes[0]
    torch.testing.assert_close(llama_cpp_logits(tmp_path / "m.gguf", INPUT_IDS), expected, rtol=0, atol=2e-2)
    convert_gguf(tmp_path / "m.gguf", tmp_path / "back")
    # The rows have length 1 already, so a plain head computes the same.
    assert json.loads((tmp_path / "back" / "config.json").read_text())["norm_head"] is False


def test_what_llama_cpp_lacks_is_noted(tmp_path: Path) -> None:
    _, config, tensors = qwen()
    config |= {"use_dynamic_ntk": True, "use_logn_attn": True, "seq_length": 24}
    report = write_gguf(save(tmp_path / "hf", config, tensors), tmp_path / "m.gguf", type="f32")
    assert "neither dynamic NTK nor log-n attention: same results up to 24 tokens" in report.notes[0]
    _, config, tensors = internlm2()
    report = write_gguf(save(tmp_path / "hf2", config, tensors), tmp_path / "m2.gguf", type="f32")
    assert "no dynamic rotary scaling: same results up to 128 tokens" in report.notes[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "opt"}, "no architecture for OPT; GGUF is written for baichuan, bloom, chatglm, cohere"),
        ({"model_type": "yuan"}, "no architecture for Yuan 2"),
        ({"model_type": "chatglm", "position_encoding_2d": True}, "no architecture for ChatGLM-6B"),
        ({"model_type": "mamba"}, "no GGUF table for the model type 'mamba'"),
        ({}, "no GGUF table for the model type ''"),
    ],
)
def test_families_llama_cpp_does_not_know(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        write_gguf(tmp_path, tmp_path / "m.gguf")
