"""Which matrices a decoder's parameters hold, for families that fuse, pack and stack them differently."""

from __future__ import annotations

import pytest
import torch

from oarsmith.training.optimizers.blocks import block_matrices, embedding_names, fused_matrices, step_size_units
from tiny import CONFIGS, tiny_decoder


@pytest.mark.parametrize("family", CONFIGS)
def test_every_matrix_of_the_blocks(family: str) -> None:
    model = tiny_decoder(family)
    parameters = dict(model.named_parameters())
    found = block_matrices(model)
    expected = {
        name for name, p in parameters.items() if name.startswith("layers.") and p.dim() == 2 and "norm" not in name
    }
    assert set(found) == expected
    for name, blocks in found.items():
        assert blocks.groups * sum(blocks.sizes) == parameters[name].shape[-2], name
    assert not any(name.startswith(("embedding", "head", "final_norm")) for name in found)


def test_llama() -> None:
    model = tiny_decoder("llama")  # 4 heads of 8, 2 kv heads, 48 intermediate
    fused = fused_matrices(model)
    assert set(fused) == {f"layers.{i}.{n}.weight" for i in (0, 1) for n in ("attention.qkv", "ffn.gate_up")}
    assert fused["layers.0.attention.qkv.weight"].sizes == (32, 16, 16)
    assert fused["layers.0.ffn.gate_up.weight"].sizes == (48, 48)
    assert step_size_units(model) == {f"layers.{i}.attention.qkv.weight": (8,) * 6 + (1,) * 16 for i in (0, 1)}
    assert embedding_names(model) == {"embedding.weight"}
    assert embedding_names(tiny_decoder("gpt2")) == {"embedding.weight", "embedding.positions.weight"}


def test_rows_packed_group_by_group() -> None:
    """GPT-NeoX: head by head its query, key and value."""
    model = tiny_decoder(
        "llama",
        model_type="gpt_neox",
        architectures=["GPTNeoXForCausalLM"],
        rotary_pct=0.25,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        use_parallel_residual=True,
    )
    name = "layers.0.attention.qkv.weight"
    blocks = fused_matrices(model)[name]
    assert (blocks.sizes, blocks.groups) == ((8, 8, 8), 4)
    weight = model.layers[0].attention.qkv.weight.detach()
    q, k, v = blocks.split(weight)
    heads = weight.view(4, 3, 8, 32)
    assert torch.equal(q, heads[:, 0].reshape(32, 32)) and torch.equal(v, heads[:, 2].reshape(32, 32))
    assert torch.equal(k, heads[:, 1].reshape(32, 32))
    assert step_size_units(model)[name] == ((8, 8) + (1,) * 8) * 4


def test_adapters_are_matrices() -> None:
    model = tiny_decoder("llama", lora_rank=4)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    found = block_matrices(model)
    assert trained <= set(found) and len(trained) == 2 * 7 * 2
    assert all(found[name].sizes == (dict(model.named_parameters())[name].shape[0],) for name in trained)


MOE = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}


def test_experts_are_matrices_side_by_side() -> None:
    model = tiny_decoder("llama", **MOE)
    found, parameters = block_matrices(model), dict(model.named_parameters())
    name = "layers.0.ffn.experts.gate_up.weight"
    assert found[name].sizes == (48, 48) and parameters[name].shape == (3, 96, 32)
    gate, up = found[name].split(parameters[name])
    assert gate.shape == up.shape == (3, 48, 32)
    assert found["layers.0.ffn.experts.down.weight"].sizes == (32,)
    assert not any("router" in name for name in found)


def test_latent_attention() -> None:
    model = tiny_decoder(
        "llama",
        model_type="deepseek_v2",
        architectures=["DeepseekV2ForCausalLM"],
        q_lora_rank=12,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        topk_method="greedy",
    )
    parameters, units = dict(model.named_parameters()), step_size_units(model)
    assert units["layers.0.attention.q_up.weight"] == (12,) * 4
    assert units["layers.0.attention.kv_up.weight"] == ((8,) + (1,) * 6) * 4
    assert all(sum(runs) == parameters[name].shape[0] for name, runs in units.items())
    assert {"q_down", "q_up", "kv_down", "kv_up", "out"} == {
        name.split(".")[3] for name in block_matrices(model) if name.startswith("layers.0.attention.")
    }
