"""PiSSA and OLoRA: their starts, and files of both kinds, beside PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import oarsmith
from oarsmith.adapters.bank import AdapterBank
from oarsmith.adapters.forms import INT8_ROWS
from oarsmith.adapters.linear import adapted_modules, attach
from oarsmith.adapters.lora import Lora
from oarsmith.adapters.peft_layout import adapter_rewrite, load_adapter_weights
from oarsmith.adapters.started import Olora, Pissa, Started, leading
from oarsmith.adapters.targets import kept_as
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.engine import Engine, Sampling
from oarsmith.errors import CheckpointError, ConfigError

from .conftest import Adapted, Base, mixtral
from .relatives import (
    SOME,
    by_peft,
    close,
    logits,
    our_gradients,
    peft_gradients,
    saved,
    settings,
    trained,
    under,
    whole,
)

PISSA, OLORA = Pissa(rank=4, alpha=8.0), Olora(rank=4, alpha=2.0)
STARTS: dict[str, Started] = {"pissa": PISSA, "olora": OLORA, "pissa_niter_400": replace(PISSA, niter=400)}


def their_start(base: Base, start: str, change: Started, **more: Any) -> Any:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=change.rank,
        lora_alpha=change.alpha,
        use_rslora=change.rslora,
        init_lora_weights=start,
        target_modules=list(SOME[base.name]),
        **more,
    )
    return peft.get_peft_model(base.oracle(), config).eval()


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("rslora", [False, True])
def test_the_start_is_peft_s(base: Callable[[str], Base], start: str, rslora: bool) -> None:
    """Up to the signs of singular vectors."""
    made, change = base("llama"), replace(STARTS[start], rslora=rslora)
    theirs = their_start(made, start, change)
    ours = dict(adapted_modules(under(made.path, change, SOME["llama"])))
    projection = theirs.base_model.model.model.layers[1].mlp.down_proj
    table = ours["layers.1.ffn.down"].adapter["down_proj"]
    pair = [projection.lora_A["default"].weight, projection.lora_B["default"].weight]
    for name, expected in zip(("lora_A", "lora_B"), pair, strict=True):
        axis = 1 if name == "lora_A" else 0
        close(table[name].norm(dim=axis), expected.norm(dim=axis), atol=1e-4)
        assert torch.equal(table[name], table[name.replace("lora", "start")])
    close(table["lora_B"] @ table["lora_A"], pair[1] @ pair[0], atol=1e-4)


def test_the_paper_s_start() -> None:
    """Scale 1: what is taken out of W has its largest singular values, and the rest the others."""
    weight = torch.randn(10, 7, generator=torch.Generator().manual_seed(1))
    a, b = replace(PISSA, alpha=4.0).start(weight, torch.Generator())
    values = torch.linalg.svdvals(weight)
    close(torch.linalg.svdvals(b @ a)[:4], values[:4])
    close(torch.linalg.svdvals(weight - b @ a)[:3], values[4:])
    close(a.norm(dim=1), b.norm(dim=0))


def test_subspace_iteration() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(40, 30, generator=generator) @ torch.diag(0.7 ** torch.arange(30.0))
    u, s, vt = leading(weight, 5, 8, generator)
    exact = torch.linalg.svd(weight)
    close(s, exact.S[:5], atol=1e-4)
    close((u * s) @ vt, (exact.U[:, :5] * exact.S[:5]) @ exact.Vh[:5], atol=1e-3)
    close(u.t() @ u, torch.eye(5))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("start", STARTS)
def test_start_and_merge(base: Callable[[str], Base], tmp_path: Path, name: str, start: str) -> None:
    path = mixtral(tmp_path / name) if name == "mixtral" else base(name).path
    whole(path, STARTS[start], SOME[name])
    whole(path, replace(STARTS[start], dropout=0.1), "all-linear")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_exact(base: Callable[[str], Base], dtype: torch.dtype) -> None:
    """Whatever is rounded, nothing is added."""
    model = under(base("llama").path, PISSA, "all-linear", dtype=dtype)
    assert torch.equal(logits(model), logits(load_decoder(base("llama").path, dtype=dtype)))


def test_small_steps_survive_16_bits(base: Callable[[str], Base]) -> None:
    """A change of A that is below A's rounding is still seen."""
    model = under(base("llama").path, PISSA, "down_proj")
    module = next(module for _, module in adapted_modules(model))
    with torch.no_grad():
        module.adapter["down_proj"]["lora_A"].mul_(1 + 2**-12)
        exact = module.merged()[0] - module.weight
        a, b = module.stacked(module.sittings()[0], torch.bfloat16)
    close((b.double() @ a.double()) / exact.norm(), exact.double() / exact.norm(), atol=2e-2)


def test_over_8_bits(base: Callable[[str], Base]) -> None:
    whole(base("llama").path, PISSA, SOME["llama"], INT8_ROWS)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("rslora", [False, True])
def test_our_file_is_lora_of_twice_the_rank(
    base: Callable[[str], Base], tmp_path: Path, start: str, rslora: bool
) -> None:
    made, change = base("llama"), replace(STARTS[start], rslora=rslora)
    model = trained(under(made.path, change, SOME["llama"]))
    folder = saved(model, tmp_path / "a")
    assert settings(folder)["init_lora_weights"] is True and settings(folder)["r"] == 8
    close(logits(by_peft(made, folder)), logits(model))
    again = oarsmith.load_model(made.path, adapter=folder, device="cpu")
    assert {type(c) for _, module in adapted_modules(again) for c in module.changes.values()} == {Lora}
    close(logits(again), logits(model))
    resumed = trained(under(made.path, change, SOME["llama"]), std=1.0)
    load_adapter_weights(resumed, folder)
    for name, parameter in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], parameter), name


def test_gradients_are_those_of_peft_s_pissa(base: Callable[[str], Base], tmp_path: Path) -> None:
    """In which W has changed; the same A and B there."""
    made = base("llama")
    theirs = their_start(made, "olora", OLORA)
    model = under(made.path, OLORA, SOME["llama"])
    expected, found = peft_gradients(theirs), our_gradients(model)
    for letter in "AB":
        key = f"base_model.model.model.layers.0.mlp.down_proj.lora_{letter}.weight"
        close(found[f"layers.0.ffn.down.adapter.down_proj.lora_{letter}"], expected[key])
    assert not any("start" in name for name in found)


@pytest.mark.parametrize(("name", "start"), [("llama", "pissa"), ("llama", "olora"), ("gpt2", "pissa")])
def test_peft_s_raw_file(adapted: Callable[..., Adapted], tmp_path: Path, name: str, start: str) -> None:
    """A and B alone: what was taken out of W is found again from W."""
    made = adapted(name, r=4, lora_alpha=6, target_modules=list(SOME[name]), init_lora_weights=start)
    ours = oarsmith.load_model(made.base.path, adapter=made.path, device="cpu")
    expected = logits(made.oracle)
    assert (expected - logits(made.base.oracle())).abs().max() > 0.01
    close(logits(ours), expected, atol=1e-4)
    folder = saved(ours, tmp_path / "again")
    assert settings(folder)["init_lora_weights"] == start and settings(folder)["r"] == 4
    stored, before = (load_file(path / "adapter_model.safetensors") for path in (folder, made.path))
    assert stored.keys() == before.keys() and all(torch.equal(stored[key], before[key]) for key in before)
    close(logits(by_peft(made.base, folder)), expected, atol=1e-4)


def test_peft_s_raw_file_by_iteration(adapted: Callable[..., Adapted]) -> None:
    made = adapted("llama", r=4, target_modules=["q_proj"], init_lora_weights="pissa_niter_900")
    ours = oarsmith.load_model(made.base.path, adapter=made.path, device="cpu")
    close(logits(ours), logits(made.oracle), atol=1e-2)


def test_requests_choose_a_raw_file_over_8_bits(adapted: Callable[..., Adapted]) -> None:
    """What is taken out is found from the weight as it is kept."""
    made = adapted("llama", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa")
    bank = AdapterBank(load_decoder(made.base.path, rewrite=kept_as(INT8_ROWS, lambda _, spec: spec)).eval())
    bank.add("pissa", [(made.path, 1.0)])
    alone = load_decoder(made.base.path, rewrite=kept_as(INT8_ROWS, adapter_rewrite(made.path)))
    attach(alone, seed=0)
    load_adapter_weights(alone, made.path)
    with bank.rows([("pissa", 0, None)]):
        close(logits(bank.decoder), logits(alone))


def test_requests_choose_a_raw_file(adapted: Callable[..., Adapted]) -> None:
    made = adapted("llama", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="pissa")
    alone = Engine(oarsmith.load_model(made.base.path, adapter=made.path, device="cpu"))
    engine = Engine(oarsmith.load_model(made.base.path, device="cpu"), adapters={"pissa": made.path})
    greedy, prompts = Sampling(max_new_tokens=6, logprobs=1), [[5, 17, 8, 3], [9]]
    for found, expected in zip(
        engine.generate(prompts, greedy, adapter="pissa"), alone.generate(prompts, greedy), strict=True
    ):
        assert found.ids == expected.ids
        assert [x.logprob for x in found.logprobs] == pytest.approx([x.logprob for x in expected.logprobs], abs=1e-4)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"init_lora_weights": "pissa_niter_many"}, "is not pissa or pissa_niter_N"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "has changed the base model's weights"),
        ({"init_lora_weights": "lora_ga"}, "has changed the base model's weights"),
        ({"init_lora_weights": "olora", "lora_bias": True}, "lora_bias cannot be read"),
    ],
)
def test_files_that_cannot_be_read(adapted: Callable[..., Adapted], values: dict[str, Any], what: str) -> None:
    made = adapted("llama", r=2, target_modules=["q_proj"])
    (made.path / "adapter_config.json").write_text(json.dumps(settings(made.path) | values))
    with pytest.raises(CheckpointError, match=what):
        oarsmith.load_model(made.base.path, adapter=made.path, device="cpu")


def test_a_rank_without_singular_vectors(base: Callable[[str], Base]) -> None:
    with pytest.raises(ConfigError, match="pissa with rank 13 on a projection of 24 to 12 features"):
        under(base("llama").path, replace(PISSA, rank=13), "k_proj")
