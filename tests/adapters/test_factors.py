"""What holds for each of MoRA, VeRA, LoKr, LoHa, IA3, FourierFT, OFT, BOFT and bottlenecks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import oarsmith
from oarsmith.adapters.change import Change
from oarsmith.adapters.forms import INT8_ROWS
from oarsmith.adapters.linear import adapted_modules, attach, disabled
from oarsmith.adapters.merge import merge_adapter
from oarsmith.adapters.methods import METHODS, changes_of
from oarsmith.adapters.peft_layout import CONFIG, WEIGHTS
from oarsmith.adapters.targets import adapt_rewrite, kept_as
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.config.load import load_config
from oarsmith.config.sft import SftConfig
from oarsmith.engine import Engine, Sampling
from oarsmith.errors import ConfigError
from oarsmith.models.decoder import Decoder
from oarsmith.models.names import Place

from .beside_peft import randomised, refused, saved
from .conftest import tokens
from .relatives import SOME

CASES: dict[str, dict[str, Any]] = {
    "mora": {"lora_rank": 2},
    "vera": {"lora_rank": 6},
    "lokr": {"lora_rank": 2},
    "lokr, both, by 4": {"lora_rank": 1, "lokr_decompose_both": True, "lokr_factor": 4, "lora_alpha": 3.0},
    "loha": {"lora_rank": 2},
    "loha of high rank": {"lora_rank": 5},
    "ia3": {},
    "fourierft": {"fourierft_frequencies": 40, "fourierft_scaling": 30.0},
    "oft": {"oft_block_size": 6},
    "oft, exact, shared": {"oft_blocks": 4, "oft_exact": True, "oft_block_share": True},
    "oft, constrained": {"oft_block_size": 4, "oft_constrained": True, "oft_eps": 0.8},
    "boft": {"boft_block_size": 4},
    "boft of two factors": {"boft_block_size": 2, "boft_factors": 2},
    "bottleneck": {"lora_rank": 4},
    "bottleneck parallel": {"lora_rank": 4, "bottleneck_placement": "parallel", "bottleneck_scale": 4.0},
}
BASES = ("llama", "gpt2", "mixtral")
MakeBase = Callable[[str], Path]


def keys(case: str, tmp_path: Path, targets: tuple[str, ...] | None = None) -> SftConfig:
    """A configuration of the method."""
    path = tmp_path / "keys.json"
    values = {"adapter_type": case.split()[0].strip(","), **CASES[case]}
    path.write_text(json.dumps(values if targets is None else {**values, "lora_target_modules": list(targets)}))
    return load_config(SftConfig, path, ["m", "d"]).config


def model_of(case: str, base: Path, tmp_path: Path, targets: tuple[str, ...] | None, *, small: bool = False) -> Decoder:
    """A fresh adapter."""
    config = keys(case, tmp_path, targets)

    def choose(places: Mapping[str, Place]) -> Mapping[str, Change]:
        return changes_of(config, places)

    rewrite = adapt_rewrite(choose)
    model = load_decoder(base, rewrite=kept_as(INT8_ROWS, rewrite) if small else rewrite).eval()
    attach(model, seed=3)
    return model


@torch.no_grad()
def logits(model: Decoder) -> torch.Tensor:
    return model(tokens(2, 9))


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("case", CASES)
def test_start_merge_and_files(base_of: MakeBase, tmp_path: Path, case: str, name: str) -> None:
    """On some parts of fused maps, on experts, and on transposed weights."""
    base = base_of(name)
    plain, model = logits(load_decoder(base)), model_of(case, base, tmp_path, SOME[name])
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-5)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains and all(".adapter." in n for n in trains)
    found = logits(randomised(model, std=0.2))
    assert (found - plain).abs().max() > 0.02
    with disabled(model):
        assert torch.equal(logits(model), plain)
    folder = saved(model, tmp_path / "adapter", base)
    again = oarsmith.load_model(base, adapter=folder, device="cpu")
    torch.testing.assert_close(logits(again), found, rtol=0, atol=1e-5)
    if all(change.mergeable for _, m in adapted_modules(model) for change in m.changes.values()):
        torch.testing.assert_close(logits(merge_adapter(model)), found, rtol=0, atol=1e-4)
        return
    with pytest.raises(ConfigError, match="cannot be merged"):
        merge_adapter(model)


# A step would leave the ball of the constrained one.
@pytest.mark.parametrize("case", [case for case in CASES if "constrained" not in case])
def test_gradients_by_differences(base_of: MakeBase, tmp_path: Path, case: str) -> None:
    """The derivative along a random direction."""
    model = randomised(model_of(case, base_of("llama"), tmp_path, SOME["llama"]))
    leaves = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(7)
    steps = [torch.randn(p.shape, generator=generator) for p in leaves]
    weights = torch.randn(2, 9, 61, generator=generator) / 100

    def loss() -> torch.Tensor:
        return (model(tokens(2, 9)) * weights).sum()

    loss().backward()
    slope = sum(float((p.grad * step).sum()) for p, step in zip(leaves, steps, strict=True) if p.grad is not None)
    assert all(p.grad is not None for p in leaves)
    values, width = [], 1e-3
    with torch.no_grad():
        for sign in (1, -2):
            for p, step in zip(leaves, steps, strict=True):
                p.add_(sign * width * step)
            values.append(float(loss()))
    assert (values[0] - values[1]) / (2 * width) == pytest.approx(slope, rel=0.03, abs=0.003)


@pytest.mark.parametrize("case", CASES)
def test_over_8_bits(base_of: MakeBase, tmp_path: Path, case: str) -> None:
    base = base_of("llama")
    model = model_of(case, base, tmp_path, SOME["llama"], small=True)
    rounded = load_decoder(base, rewrite=kept_as(INT8_ROWS, lambda family, spec: spec))
    torch.testing.assert_close(logits(model), logits(rounded), rtol=0, atol=0.15 if "oft" in case else 1e-4)
    exact = randomised(model_of(case, base, tmp_path, SOME["llama"]))
    effect = logits(exact) - logits(load_decoder(base))
    found = logits(randomised(model)) - logits(rounded)
    assert torch.cosine_similarity(found.flatten(), effect.flatten(), dim=0) > 0.97
    model(tokens(2, 9)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("case", CASES)
def test_a_bf16_base(base_of: MakeBase, tmp_path: Path, case: str) -> None:
    """Answers have its dtype, and the adapter's tensors are fp32."""
    base = base_of("llama")
    folder = saved(randomised(model_of(case, base, tmp_path, None)), tmp_path / "adapter", base)
    wide = oarsmith.load_model(base, adapter=folder, device="cpu")
    model = oarsmith.load_model(base, dtype="bf16", adapter=folder, device="cpu")
    assert {p.dtype for _, m in adapted_modules(model) for p in m.adapter.parameters()} == {torch.float32}
    found, expected = logits(model), logits(wide)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.05 * expected.norm()
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


PROMPTS = [[5, 17, 8, 3], [9], list(range(20, 31))]
GREEDY = Sampling(max_new_tokens=5, logprobs=1)


@pytest.mark.parametrize("case", ["mora", "vera", "lokr", "loha", "ia3", "fourierft", "oft", "boft", "bottleneck"])
def test_requests_choose_it(base_of: MakeBase, tmp_path: Path, case: str) -> None:
    """In a step with requests that have none."""
    base = base_of("llama")
    folder = saved(randomised(model_of(case, base, tmp_path, SOME["llama"])), tmp_path / "adapter", base)
    alone = Engine(oarsmith.load_model(base, adapter=folder, device="cpu")).generate(PROMPTS, GREEDY)
    plain = Engine(oarsmith.load_model(base, device="cpu")).generate(PROMPTS, GREEDY)
    engine = Engine(oarsmith.load_model(base, device="cpu"), adapters={"it": folder})
    wanted = {}
    for index, prompt in enumerate(PROMPTS):
        wanted[engine.add(prompt, GREEDY, adapter="it")] = alone[index]
        wanted[engine.add(prompt, GREEDY)] = plain[index]
    found = {}
    while engine.busy:
        found |= {output.id: output.completion for output in engine.step() if output.completion is not None}
    for key, expected in wanted.items():
        assert found[key].ids == expected.ids
        assert [x.logprob for x in found[key].logprobs] == pytest.approx(
            [x.logprob for x in expected.logprobs], abs=1e-4
        )


@pytest.mark.parametrize("case", CASES)
def test_damaged_files(base_of: MakeBase, tmp_path: Path, case: str) -> None:
    base = base_of("llama")
    folder = saved(model_of(case, base, tmp_path, ("q_proj",)), tmp_path / "adapter", base)
    stored = load_file(folder / WEIGHTS)
    name = sorted(stored)[0]
    save_file({**stored, name: torch.zeros(*stored[name].shape, 1)}, folder / WEIGHTS)
    message = refused(lambda: oarsmith.load_model(base, adapter=folder, device="cpu"))
    assert f"tensor {name} has shape" in message or "model.layers.0.self_attn.q_proj has a" in message
    # Where a projection has one tensor only, one less is another adapter.
    if len(stored) > 2:
        save_file({key: tensor for key, tensor in stored.items() if key != name}, folder / WEIGHTS)
        message = refused(lambda: oarsmith.load_model(base, adapter=folder, device="cpu"))
        assert f"tensor {name} is missing" in message or "model.layers.0.self_attn.q_proj has a" in message
    odd = "base_model.model.model.layers.0.self_attn.q_proj.lora_E"
    save_file({**stored, odd: torch.zeros(2)}, folder / WEIGHTS)
    assert f"tensor {odd} has no place" in refused(lambda: oarsmith.load_model(base, adapter=folder, device="cpu"))
    save_file(stored, folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "modules_to_save": ["lm_head"]}))
    assert "modules_to_save" in refused(lambda: oarsmith.load_model(base, adapter=folder, device="cpu"))


def test_every_method_has_a_test() -> None:
    ours = {method.name for method in METHODS} & {
        "mora", "vera", "lokr", "loha", "ia3", "fourierft", "oft", "boft", "bottleneck"
    }  # fmt: skip
    assert ours == {case.split()[0].strip(",") for case in CASES} and len(ours) == 9


@pytest.mark.parametrize("case", CASES)
def test_the_same_seed_gives_the_same_start(base_of: MakeBase, tmp_path: Path, case: str) -> None:
    first, second = (model_of(case, base_of("llama"), tmp_path, None) for _ in range(2))
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name
