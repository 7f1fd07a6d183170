"""DeepSeek where transformers and the authors differ, what released files hold beside the decoder, and refusals."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from oarsmith.checkpoint.fill import meta_decoder
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.errors import CheckpointError, ModelError
from oarsmith.models import families
from oarsmith.models.moe import Router
from oarsmith.models.spec_parts import MoE, RouterSpec

from .conftest import VARIANTS, Case, read_json, tokens

Make = Callable[[str], Case]
V2 = {**VARIANTS["deepseek_v2"][1], "model_type": "deepseek_v2"}
V3 = {**VARIANTS["deepseek_v3"][1], "model_type": "deepseek_v3"}


def router(config: dict[str, Any]) -> RouterSpec:
    ffn = families.build_spec(config)[1].layers[-1].ffn
    assert isinstance(ffn, MoE)
    return ffn.router


def test_normalising_takes_the_place_of_the_factor_in_v2() -> None:
    """modeling_deepseek.py of V2: `if self.top_k > 1 and self.norm_topk_prob: ... else: ... * routed_scaling_factor`;
    V3's multiplies in both cases. transformers ignores V2's key; all released V2 configs say false."""
    assert (router(V2).normalize, router(V2).scale) == (False, 2.0)
    normed = router({**V2, "norm_topk_prob": True})
    assert (normed.normalize, normed.scale) == (True, 1.0)
    single = router({**V2, "norm_topk_prob": True, "num_experts_per_tok": 1})
    assert (single.normalize, single.scale) == (False, 2.0)
    assert (router(V3).normalize, router(V3).scale) == (True, 2.5)


def test_every_other_layer_has_experts() -> None:
    spec = families.build_spec({**V2, "moe_layer_freq": 2, "first_k_dense_replace": 1, "num_hidden_layers": 5})[1]
    assert [isinstance(layer.ffn, MoE) for layer in spec.layers] == [False, False, True, False, True]


@torch.no_grad()
def test_groups_and_correction_by_hand() -> None:
    """8 experts in 4 groups, 2 open, 2 chosen. The correction opens and chooses, and is not in the weights."""
    ffn = families.build_spec({**V3, "num_experts_per_tok": 2, "hidden_size": 8})[1].layers[-1].ffn
    assert isinstance(ffn, MoE)
    module = Router(ffn.router, 8)
    module.weight.copy_(torch.eye(8))
    assert module.correction is not None
    module.correction.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.0, 0.0]))
    # Sums of a group's two best: 1.1, 1.2, 1.7 (0.7 without its correction), 1.0.
    scores = torch.tensor([0.9, 0.2, 0.6, 0.6, 0.4, 0.3, 0.5, 0.5])
    weights, chosen = module(torch.logit(scores)[None])
    assert chosen.tolist() == [[4, 5]]
    torch.testing.assert_close(weights, torch.tensor([[0.4, 0.3]]) / 0.7 * 2.5)


@torch.no_grad()
def test_layers_past_the_last_are_left_out(case: Make, tmp_path: Path) -> None:
    """Multi-token prediction: embedding, head, norms and a whole block of their own under model.layers.N."""
    folder = tmp_path / "released"
    shutil.copytree(case("deepseek_v3").path, folder)
    stored = load_file(folder / "model.safetensors")
    extra = {k.replace("layers.2.", "layers.3."): v.clone() for k, v in stored.items() if "layers.2." in k}
    extra |= {f"model.layers.3.{name}.weight": torch.ones(3) for name in ("eh_proj", "enorm", "shared_head.head")}
    save_file({**stored, **extra}, folder / "model.safetensors")
    ids = tokens(1, 9)
    assert torch.equal(load_decoder(folder)(ids), case("deepseek_v3").decoder()(ids))
    v2 = tmp_path / "v2"
    shutil.copytree(case("deepseek_v2").path, v2)
    save_file({**load_file(v2 / "model.safetensors"), "model.layers.3.x": torch.ones(1)}, v2 / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.x"):
        load_decoder(v2)


@torch.no_grad()
def test_the_correction_stays_fp32(case: Make) -> None:
    model = load_decoder(case("deepseek_v3").path, dtype=torch.bfloat16)
    stored = load_file(case("deepseek_v3").path / "model.safetensors")
    found = dict(model.named_parameters())["layers.2.ffn.router.correction"]
    assert not found.requires_grad
    assert torch.equal(found, stored["model.layers.2.mlp.gate.e_score_correction_bias"]) and found.any()


def test_the_softmax_scale_has_the_squared_m_scale() -> None:
    attention = families.build_spec(V2)[1].layers[0].attention
    mscale = 0.1 * 0.707 * 1.3862943611198906 + 1  # ln 4
    assert attention.scale == pytest.approx(18**-0.5 * mscale**2)
    plain = {**V2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    assert families.build_spec(plain)[1].layers[0].attention.scale == 18**-0.5


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({**V2, "topk_method": "noaux_tc"}, ["unknown topk_method 'noaux_tc'", "greedy, group_limited_greedy"]),
        ({**V2, "scoring_func": "sigmoid"}, ["unknown scoring_func 'sigmoid'", "softmax"]),
        ({**V3, "scoring_func": "softmax"}, ["unknown scoring_func 'softmax'", "sigmoid"]),
        ({**V3, "n_group": 3}, ["8 experts in n_group 3 groups"]),
        ({**V3, "n_group": 8}, ["a group scores by its best 2"]),
        ({**V3, "num_experts_per_tok": 5}, ["topk_group 2 of them open, cannot give a token 5"]),
        ({**V2, "num_experts_per_tok": 9}, ["num_experts_per_tok 9 of only 8 experts"]),
        ({**V2, "num_experts_per_tok": None}, ["num_experts_per_tok must be a positive integer, got None"]),
    ],
)
def test_refused(config: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        families.build_spec(config)
    for part in parts:
        assert part in str(caught.value)


def test_gpt_oss_defaults_and_layer_types(case: Make) -> None:
    """A missing key is what the family's own config class says; null rope_scaling means none."""
    config = read_json(case("gpt_oss").path / "config.json")
    kept = {k: v for k, v in config.items() if k not in ("rope_parameters", "sliding_window", "swiglu_limit")}
    mixer = families.build_spec(kept)[1].layers[0].attention
    assert mixer.window == 128 and mixer.position.scaling.factor == 32 and mixer.position.theta == 150000
    assert not mixer.position.scaling.truncate
    assert families.build_spec({**kept, "rope_scaling": None})[1].layers[0].attention.position.scaling is None
    types = ["full_attention", "sliding_attention", "sliding_attention"]
    layers = families.build_spec({**config, "layer_types": types})[1].layers
    assert [layer.attention.window for layer in layers] == [None, 5, 5]
    assert families.build_spec(kept)[1].layers[0].ffn.experts.activation.limit == 7.0


def test_released_sizes() -> None:
    """Parameters of the published models: 15.7B (V2-Lite), 236B (V2), 671B (V3), 20.9B (gpt-oss-20b)."""
    lite = {
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
    }
    large = lite | {
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "n_routed_experts": 160,
        "topk_method": "group_limited_greedy",
        "n_group": 8,
        "topk_group": 3,
        "q_lora_rank": 1536,
    }
    third = {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
    }
    oss = {
        "model_type": "gpt_oss",
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_local_experts": 32,
    }
    counts = []
    for config in (lite, large, third, oss):
        model = meta_decoder(families.build_spec(config)[1], config, torch.bfloat16)
        counts.append(round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 1))
    assert counts == [15.7, 235.7, 671.0, 20.9]
