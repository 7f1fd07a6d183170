"""PaddleNLP's names, as its modeling files spell them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from oarsmith.checkpoint.convert import convert_directory
from oarsmith.checkpoint.paddle.names import FAMILIES, layout

FIXTURES = Path(__file__).parents[2] / "fixtures" / "families"
LAYER = "model.layers.3."


@pytest.mark.parametrize(
    ("family", "name", "axes", "expected", "transposed"),
    [
        ("llama", "model.embed_tokens.weight", 2, "llama.embed_tokens.weight", False),
        ("llama", "lm_head.weight", 2, "lm_head.weight", True),
        ("llama", LAYER + "input_layernorm.weight", 1, "llama.layers.3.input_layernorm.weight", False),
        ("qwen2", LAYER + "self_attn.q_proj.bias", 1, "qwen2.layers.3.self_attn.q_proj.bias", False),
        ("qwen2_moe", LAYER + "mlp.gate.weight", 2, "qwen2_moe.layers.3.mlp.gate.weight", True),
        (
            "qwen2_moe",
            LAYER + "mlp.shared_expert_gate.weight",
            2,
            "qwen2_moe.layers.3.mlp.shared_expert_gate.weight",
            True,
        ),
        (
            "mixtral",
            LAYER + "block_sparse_moe.experts.5.w1.weight",
            2,
            "mixtral.layers.3.block_sparse_moe.experts.5.w1.weight",
            True,
        ),
        (
            "deepseek_v2",
            LAYER + "self_attn.kv_b_proj.weight",
            2,
            "deepseek_v2.layers.3.self_attn.kv_b_proj.weight",
            True,
        ),
        ("qwen3", LAYER + "self_attn.q_norm.weight", 1, "model.layers.3.self_attn.q_norm.weight", False),
        ("qwen3_moe", LAYER + "mlp.experts.5.up_proj.weight", 2, "model.layers.3.mlp.experts.5.up_proj.weight", True),
        ("yuan", LAYER + "self_attn.lf_gate.conv1.weight", 4, "yuan.layers.3.self_attn.lf_gate.conv1.weight", False),
        ("qwen", "transformer.h.3.attn.c_attn.weight", 2, "qwen.h.3.attn.c_attn.weight", True),
        ("qwen", "transformer.wte.weight", 2, "qwen.wte.weight", False),
        ("bloom", "transformer.word_embeddings.weight", 2, "bloom.word_embeddings.weight", False),
        ("bloom", "transformer.word_embeddings_layernorm.bias", 1, "bloom.word_embeddings_layernorm.bias", False),
        ("bloom", "transformer.h.3.mlp.dense_h_to_4h.weight", 2, "bloom.h.3.mlp.dense_h_to_4h.weight", True),
        ("opt", "model.decoder.embed_tokens.weight", 2, "opt.embeddings.word_embeddings.weight", False),
        ("opt", "model.decoder.embed_positions.weight", 2, "opt.embeddings.position_embeddings.weight", False),
        ("opt", "model.decoder.layers.3.fc1.weight", 2, "opt.decoder.layers.3.linear1.weight", True),
        ("opt", "model.decoder.layers.3.self_attn_layer_norm.bias", 1, "opt.decoder.layers.3.norm1.bias", False),
        ("opt", "model.decoder.layers.3.final_layer_norm.bias", 1, "opt.decoder.layers.3.norm2.bias", False),
        (
            "opt",
            "model.decoder.layers.3.self_attn.out_proj.bias",
            1,
            "opt.decoder.layers.3.self_attn.out_proj.bias",
            False,
        ),
        ("opt", "model.decoder.final_layer_norm.weight", 1, "opt.decoder.final_layer_norm.weight", False),
        ("gpt2", "transformer.wpe.weight", 2, "gpt.embeddings.position_embeddings.weight", False),
        ("gpt2", "transformer.h.3.mlp.c_fc.weight", 2, "gpt.decoder.layers.3.linear1.weight", False),
        ("gpt2", "transformer.h.3.attn.c_proj.bias", 1, "gpt.decoder.layers.3.self_attn.out_proj.bias", False),
        ("gpt2", "transformer.ln_f.bias", 1, "gpt.decoder.norm.bias", False),
        ("chatglm", "transformer.word_embeddings.weight", 2, "chatglm.transformer.word_embeddings.weight", False),
        (
            "chatglm",
            "transformer.layers.3.attention.dense.weight",
            2,
            "chatglm.transformer.layers.3.attention.dense.weight",
            True,
        ),
        ("chatglm_v2", "transformer.output_layer.weight", 2, "chatglm_v2.output_layer.weight", True),
        (
            "chatglm_v2",
            "transformer.encoder.final_layernorm.weight",
            1,
            "chatglm_v2.encoder.final_layernorm.weight",
            False,
        ),
    ],
)
def test_names(family: str, name: str, axes: int, expected: str, transposed: bool) -> None:
    where = layout(FAMILIES[family], name, axes)
    assert (where.names, where.transposed) == ((expected,), transposed)


def test_a_split_projection() -> None:
    where = layout(FAMILIES["gpt2"], "transformer.h.0.attn.c_attn.weight", 2)
    assert [name.rsplit(".", 2)[-2] for name in where.names] == ["q_proj", "k_proj", "v_proj"]
    whole = torch.arange(24.0).reshape(2, 12)
    pieces = where.split(whole)
    assert [tuple(piece.shape) for piece in pieces] == [where.piece_shape((2, 12))] * 3 == [(2, 4)] * 3
    assert torch.equal(where.join(list(pieces)), whole)


def test_chatglm_with_the_head_that_it_was_released_with(tmp_path: Path) -> None:
    """Hugging Face stores the matrix twice, PaddleNLP once."""
    folder = shutil.copytree(FIXTURES / "chatglm_6b", tmp_path / "model")
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"].clone()
    torch.save(weights, folder / "pytorch_model.bin")
    convert_directory(folder, tmp_path / "paddle", "pdparams")
    convert_directory(tmp_path / "paddle", tmp_path / "back", "hf")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], weights["lm_head.weight"])
    assert all(torch.equal(found[name], weights[name]) for name in found)
