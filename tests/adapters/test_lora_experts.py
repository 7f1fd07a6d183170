"""LoRA on stacked experts: as many plain LoRA maps as there are experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

import oarsmith
from oarsmith.adapters.linear import Adapt, adapted_modules, attach
from oarsmith.adapters.lora import Lora
from oarsmith.adapters.merge import merge_adapter
from oarsmith.adapters.peft_layout import adapter_rewrite, load_adapter_weights, write_adapter
from oarsmith.adapters.targets import adapt_rewrite, match_targets
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.errors import ConfigError
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.init import init_weights
from oarsmith.models.linear import ExpertLinear
from oarsmith.models.spec_parts import LinearSpec, Segment

EXPERTS, COUNTS = 3, [4, 0, 2]
LORA = Adapt(changes=(("up", Lora(rank=2, alpha=1.0)), ("gate", Lora(rank=3, alpha=-6.0))))
SPEC = LinearSpec(in_features=6, segments=(Segment(name="gate", size=4), Segment(name="up", size=5)), bias=True)
CONFIG = {
    "model_type": "mixtral",
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


PROBE = torch.arange(11)[None] * 5


@torch.no_grad()
def randomised(parameters: object, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def test_the_same_as_one_map_for_each_expert() -> None:
    stacked = LORA.build(replace(SPEC, experts=EXPERTS, rewrite=LORA))
    randomised(stacked.parameters(), 1)
    x = torch.randn(sum(COUNTS), 6, generator=torch.Generator().manual_seed(2)).requires_grad_()
    leaves = list(stacked.parameters())
    found = stacked(x, COUNTS)
    dout = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    grad_x, *grads = torch.autograd.grad(found, [x, *leaves], dout)
    outs, grads_x = [], []
    for expert, (rows, part) in enumerate(zip(x.detach().split(COUNTS), dout.split(COUNTS), strict=True)):
        single = LORA.build(replace(SPEC, rewrite=LORA))
        with torch.no_grad():
            for own, all_of_them in zip(single.parameters(), leaves, strict=True):
                own.copy_(all_of_them[expert])
        rows = rows.clone().requires_grad_()
        out = single(rows)
        outs.append(out)
        row_grad, *own_grads = torch.autograd.grad(out, [rows, *single.parameters()], part)
        grads_x.append(row_grad)
        for own, all_of_them in zip(own_grads, grads, strict=True):
            torch.testing.assert_close(all_of_them[expert], own)
    torch.testing.assert_close(found, torch.cat(outs))
    torch.testing.assert_close(grad_x, torch.cat(grads_x))


def adapted(rewrite_of: str = "") -> Decoder:
    def choose(modules: list[str]) -> dict[str, Lora]:
        return {m: Lora(rank=2, alpha=3.0) for m in match_targets(modules, "all-linear") if rewrite_of in m}

    family, spec = families.build_spec(CONFIG)
    model = Decoder(adapt_rewrite(choose)(family, spec), CONFIG)
    init_weights(model, 0)
    attach(model, 0)
    randomised([*model.parameters()], 5)
    return model.eval()


def logits(model: Decoder) -> Tensor:
    with torch.no_grad():
        return model(PROBE)


@pytest.mark.parametrize("targets", ["", "experts", "w2", "self_attn"])
def test_merged_equals_adapted(targets: str) -> None:
    model = adapted(targets)
    expected = logits(model)
    merged = merge_adapter(model)
    assert not list(adapted_modules(merged)) and type(merged.layers[0].ffn.experts.gate_up) is ExpertLinear
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)


def test_peft_layout_names_every_expert(tmp_path: Path) -> None:
    """As PEFT wrote them when transformers kept experts apart: one pair of matrices for each."""
    model = adapted()
    write_adapter(model, tmp_path, base="x")
    family, spec = families.build_spec(CONFIG)
    again = Decoder(adapter_rewrite(tmp_path)(family, spec), CONFIG)
    attach(again, 1)
    with torch.no_grad():
        for (_, ours), (name, theirs) in zip(again.named_parameters(), model.named_parameters(), strict=True):
            if ".adapter." not in name:
                ours.copy_(theirs)
    load_adapter_weights(again, tmp_path)
    assert torch.equal(logits(again.eval()), logits(model))
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        name = "base_model.model.model.layers.1.block_sparse_moe.experts.3.w1.lora_A.weight"
        assert file.get_slice(name).get_shape() == [2, 16]


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_peft_reads_it(model_type: str, tmp_path: Path) -> None:
    """PEFT stacks the experts' adapters for transformers 5, which stacks the experts."""
    config = {**CONFIG, "model_type": model_type, "num_experts": 4, "moe_intermediate_size": 12, "head_dim": 8}
    plain = Decoder(families.build_spec(config)[1], config)
    randomised(plain.parameters(), 3)
    oarsmith.save_model(plain, tmp_path / "base")

    change = Lora(rank=2, alpha=3.0)
    rewrite = adapt_rewrite(lambda modules: dict.fromkeys(match_targets(modules, "all-linear"), change))
    model = load_decoder(tmp_path / "base", rewrite=rewrite).eval()
    attach(model, 0)
    randomised((p for p in model.parameters() if p.requires_grad), 5)
    (tmp_path / "adapter").mkdir()
    write_adapter(model, tmp_path / "adapter", base="base")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    with torch.no_grad():
        before = oracle(PROBE).logits
        found = peft.PeftModel.from_pretrained(oracle, tmp_path / "adapter").eval()(PROBE).logits
    torch.testing.assert_close(found, logits(model), rtol=0, atol=1e-4)
    assert (found - before).abs().max() > 0.1


def test_some_experts_only_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"experts\.0\.w1 and .*experts\.1\.w1 do not have the same adapter"):
        adapted("experts.0")
