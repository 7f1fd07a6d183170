"""AdaLoRA: the map, its files and its ranks beside PEFT's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import oarsmith
from oarsmith.adapters.adalora import AdaLora, RankSchedule, set_schedule
from oarsmith.adapters.adalora_ranks import RankAllocation, WithOrthogonality, orthogonality
from oarsmith.adapters.forms import INT8_ROWS
from oarsmith.adapters.linear import adapted_modules
from oarsmith.config.adapters import AdapterKeys
from oarsmith.errors import CheckpointError, ConfigError
from oarsmith.methods.sft import OBJECTIVE
from oarsmith.models.decoder import Decoder
from oarsmith.training.optimizer import AdamW, AdamWSettings
from oarsmith.training.step import run_step
from tiny import batches_of, random_samples

from .conftest import Adapted, Base, mixtral
from .relatives import (
    IDS,
    SOME,
    by_peft,
    close,
    logits,
    loss_of,
    our_gradients,
    peft_gradients,
    same_as_peft,
    saved,
    settings,
    trained,
    under,
    whole,
)

ADA = AdaLora(rank=5, first=5, target=2, alpha=40.0, schedule=RankSchedule(total=12, tinit=2, tfinal=3, delta_t=2))
ARGUMENTS = {"init_r": 5, "target_r": 2, "lora_alpha": 40, "total_step": 12, "tinit": 2, "tfinal": 3, "deltaT": 2}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_s_adapter(adapted: Callable[..., Adapted], tmp_path: Path, name: str) -> None:
    made = adapted(name, kind=peft.AdaLoraConfig, target_modules=list(SOME[name]), **ARGUMENTS)
    ours = same_as_peft(made, tmp_path / "again")
    found = settings(tmp_path / "again")
    assert {key: found[key] for key in ARGUMENTS} == ARGUMENTS and found["rank_pattern"] is None
    changes = {c for _, module in adapted_modules(ours) for c in module.changes.values()}
    assert changes == {replace(ADA)}


def test_gradients_are_peft_s(base: Callable[[str], Base], tmp_path: Path) -> None:
    """With the term of the loss that keeps the matrices orthonormal."""
    model = trained(under(base("llama").path, ADA, SOME["llama"]))
    oracle = by_peft(base("llama"), saved(model, tmp_path / "a"))
    plain, theirs = our_gradients(model), peft_gradients(oracle)
    oracle.zero_grad()
    found = oracle(IDS, labels=IDS)
    found.loss.backward()
    both = {n: p.grad for n, p in oracle.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = loss_of(model(IDS)) + orthogonality(model)
    total.backward()
    close(total, found.loss)
    assert len(plain) == len(theirs) == 18
    for letter in "ABE":
        ours = f"layers.1.ffn.down.adapter.down_proj.lora_{letter}"
        key = f"base_model.model.model.layers.1.mlp.down_proj.lora_{letter}"
        close(plain[ours], theirs[key])
        grad = model.get_parameter(ours).grad
        assert grad is not None
        close(grad, both[f"{key}.default"])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_start_and_merge(base: Callable[[str], Base], tmp_path: Path, name: str) -> None:
    path = mixtral(tmp_path / name) if name == "mixtral" else base(name).path
    whole(path, ADA, SOME[name])
    whole(path, replace(ADA, dropout=0.1), "all-linear")


def test_over_8_bits(base: Callable[[str], Base]) -> None:
    whole(base("llama").path, ADA, SOME["llama"], INT8_ROWS)


def one_step(model: Decoder, oracle: Any, ranks: RankAllocation, step: int) -> None:
    """The same made-up gradients on both sides, weights that move, and an allocation."""
    grads = {}
    theirs = {name: p for name, p in oracle.named_parameters() if p.requires_grad}
    pairs = []
    for layer in range(2):
        for where, segment, module in (
            ("self_attn", "q_proj", "attention.qkv"),
            ("self_attn", "v_proj", "attention.qkv"),
            ("mlp", "down_proj", "ffn.down"),
        ):
            for letter in "ABE":
                ours = f"layers.{layer}.{module}.adapter.{segment}.lora_{letter}"
                pairs.append((ours, f"base_model.model.model.layers.{layer}.{where}.{segment}.lora_{letter}.default"))
    for index, (ours, key) in enumerate(pairs):
        generator = torch.Generator().manual_seed(100 * step + index)
        grad = torch.randn(theirs[key].shape, generator=generator)
        move = 0.1 * torch.randn(theirs[key].shape, generator=generator)
        with torch.no_grad():
            theirs[key].add_(move)
            model.get_parameter(ours).add_(move)
        grads[ours], theirs[key].grad = 2 * grad, grad
    ranks.updated(grads, grad_scale=0.5, step=step)
    oracle.base_model.update_and_allocate(step)
    for ours, key in pairs:
        close(model.get_parameter(ours), theirs[key])


def test_ranks_are_peft_s(base: Callable[[str], Base], tmp_path: Path) -> None:
    """Step by step, and with a resume between any two."""
    made = base("llama")
    model = under(made.path, ADA, SOME["llama"])
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=list(SOME["llama"]), **ARGUMENTS)
    oracle = peft.get_peft_model(made.oracle(), config)
    names = dict(oracle.named_parameters())
    with torch.no_grad():
        for key, tensor in load_file(saved(model, tmp_path / "0") / "adapter_model.safetensors").items():
            names[f"{key}.default"].copy_(tensor)
    ranks = RankAllocation(model, ADA.schedule)
    zeros = []
    for step in range(1, 13):
        one_step(model, oracle, ranks, step)
        zeros.append(sum(int((p == 0).sum()) for name, p in model.named_parameters() if name.endswith("lora_E")))
        state = {name: tensor.clone() for name, tensor in ranks.state_tensors().items()}
        ranks = RankAllocation(model, ADA.schedule)
        ranks.load_state(state)
    # 6 matrices from 5 ranks to 2.
    assert zeros[:2] == [0, 0] and zeros[-4:] == [18] * 4 and 0 < zeros[3] < 18
    # PEFT writes what is left, and we read it; what we write, it reads.
    oracle.save_pretrained(tmp_path / "theirs")
    pruned = oarsmith.load_model(made.path, adapter=tmp_path / "theirs", device="cpu")
    assert sum(c.rank for _, module in adapted_modules(pruned) for c in module.changes.values()) == 12
    close(logits(pruned), logits(model))
    again = saved(pruned, tmp_path / "again")
    assert sum(map(sum, settings(again)["rank_pattern"].values())) == 12
    close(logits(by_peft(made, again)), logits(model))
    close(logits(by_peft(made, saved(model, tmp_path / "ours"))), logits(model))


def test_a_layer_without_ranks_and_ranknum_in_the_file(adapted: Callable[..., Adapted], tmp_path: Path) -> None:
    made = adapted("llama", kind=peft.AdaLoraConfig, target_modules=["q_proj", "v_proj"], **ARGUMENTS)
    weights, config = made.path / "adapter_model.safetensors", made.path / "adapter_config.json"
    stored = load_file(weights)
    lost = "model.layers.0.self_attn.v_proj"
    for key in list(stored):
        if lost in key:
            stored[key] = stored[key][:, :0].contiguous() if key.endswith("lora_B") else stored[key][:0].contiguous()
        if key.endswith("lora_E"):
            stored[key.replace("lora_E", "ranknum")] = torch.tensor([5.0])
    save_file(stored, weights)
    names = [f"model.layers.{layer}.self_attn.{leaf}.lora_E" for layer in range(2) for leaf in ("q_proj", "v_proj")]
    pattern = {name: [not name.startswith(lost)] * 5 for name in names}
    config.write_text(json.dumps({**settings(made.path), "rank_pattern": pattern}))
    ours = oarsmith.load_model(made.base.path, adapter=made.path, device="cpu")
    with torch.no_grad():
        made.oracle.get_parameter(f"base_model.model.{lost}.lora_E.default").zero_()
    expected = logits(made.oracle)
    close(logits(ours), expected)
    again = saved(ours, tmp_path / "again")
    assert load_file(again / "adapter_model.safetensors").keys() == stored.keys()
    assert settings(again)["rank_pattern"] == pattern
    close(logits(by_peft(made.base, again)), expected)
    model = ours.train().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("lora_A"))
    assert all(grad.isfinite().all() for grad in our_gradients(model).values())


def test_experts_are_matrices_of_their_own(tmp_path: Path) -> None:
    """As many scores as if each expert were a projection."""
    model = trained(under(mixtral(tmp_path / "base"), ADA, "w1"))
    ranks = RankAllocation(model, ADA.schedule)
    tables = {path: module.adapter["w1"] for path, module in adapted_modules(model)}
    grads = {
        f"{path}.adapter.w1.{name}": torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        for path, table in tables.items()
        for i, (name, p) in enumerate(table.items())
    }
    for step in range(1, 10):
        ranks.updated(grads, grad_scale=1.0, step=step)
    kept = torch.cat([table["lora_E"].flatten() for table in tables.values()])
    assert int((kept != 0).sum()) == 2 * 3 * 2
    folder = saved(model, tmp_path / "a")
    again = oarsmith.load_model(tmp_path / "base", adapter=folder, device="cpu")
    close(logits(again), logits(model))


def test_the_objective(base: Callable[[str], Base]) -> None:
    """The term counts once, in however many passes a step is made, and not in evaluations."""
    model = trained(under(base("llama").path, ADA, "all-linear"))
    batches = batches_of(random_samples([9, 12, 7, 5], vocab_size=61), 1)
    objective, count = WithOrthogonality(OBJECTIVE), sum(batch.num_trained for batch in batches)
    term = orthogonality(model)
    found = [objective(model, batch, 1 / count) for batch in batches]
    plain = [OBJECTIVE(model, batch, 1 / count) for batch in batches]
    close(sum(o.loss for o in found), sum(o.loss for o in plain) + term)
    assert [o.total for o in found] == [o.total for o in plain]
    assert sum(o.sums["orthogonality"] for o in found) / count == pytest.approx(float(term.detach()))
    assert "orthogonality" not in objective(model.eval(), batches[0], 1.0).sums


def test_in_steps(base: Callable[[str], Base]) -> None:
    """Through the trainer's own update, with the weights after it and the clipped gradient."""
    model = trained(under(base("llama").path, ADA, "down_proj"))
    optimizer = AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], AdamWSettings())
    ranks = RankAllocation(model, ADA.schedule)
    batches = batches_of(random_samples([9, 12], vocab_size=61), 2)
    seen = []
    for number in range(1, 13):
        run_step(model, OBJECTIVE, batches, optimizer, lr=1e-2, max_grad_norm=1e-2, hooks=ranks, number=number)
        seen.append(sum(int((p == 0).sum()) for n, p in model.named_parameters() if n.endswith("lora_E")))
    assert seen[0] == 0 and seen[-4:] == [6] * 4
    name = "layers.0.ffn.down.adapter.down_proj.lora_A"
    assert not ranks.state_tensors()[f"{name}/sensitivity"].any(), "no longer needed"


def test_schedules(base: Callable[[str], Base]) -> None:
    model = under(base("llama").path, ADA, "q_proj")
    keys = AdapterKeys(adapter_type="adalora")
    assert set_schedule(model, keys, 100) == RankSchedule(total=100, tinit=10, tfinal=33)
    assert all(c.schedule.total == 100 for _, m in adapted_modules(model) for c in m.changes.values())
    with pytest.raises(ConfigError, match="no step is between them"):
        set_schedule(model, AdapterKeys(adapter_type="adalora", adalora_tinit=60, adalora_tfinal=40), 100)
    assert RankSchedule(total=10).budget(5, 100, 20) == (30, True)
    ranks = RankAllocation(model, RankSchedule(total=10))
    with pytest.raises(CheckpointError, match="does not fit this model"):
        ranks.load_state({})
    # As many at the end as at first: none is given up.
    same = trained(under(base("llama").path, replace(ADA, target=5), "q_proj"))
    ranks = RankAllocation(same, RankSchedule(total=2))
    zeros = {n: torch.zeros_like(p) for n, p in same.named_parameters() if p.requires_grad}
    for step in (1, 2):
        ranks.updated(zeros, grad_scale=1.0, step=step)
    assert all(bool(p.all()) for n, p in same.named_parameters() if n.endswith("lora_E"))


def test_damaged(adapted: Callable[..., Adapted]) -> None:
    made = adapted("llama", kind=peft.AdaLoraConfig, target_modules=["q_proj"], **ARGUMENTS)
    path = made.path / "adapter_model.safetensors"
    stored = load_file(path)
    lost = next(key for key in stored if key.endswith("lora_E"))
    save_file({key: tensor for key, tensor in stored.items() if key != lost}, path)
    with pytest.raises(CheckpointError, match=f"{lost.split('.')[-2]} has no lora_E"):
        oarsmith.load_model(made.base.path, adapter=made.path, device="cpu")
    other = next(key for key in stored if key.endswith("lora_A"))
    save_file({**stored, other: torch.zeros(7, 24)}, path)
    with pytest.raises(CheckpointError, match=rf"tensor {other} has shape \(7, 24\)"):
        oarsmith.load_model(made.base.path, adapter=made.path, device="cpu")
