"""The LoRA linear map itself, its start, its dropout and its merge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.adapters.linear import Adapt, AdaptedLinear, adapted_modules, attach
from oarsmith.adapters.lora import Lora, lora_scale
from oarsmith.adapters.merge import base_logits, merge_adapter, prompt_logits, prove
from oarsmith.adapters.targets import adapt_rewrite, match_targets
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.models.decoder import Decoder
from oarsmith.models.linear import Linear
from oarsmith.models.spec import linear_specs
from oarsmith.models.spec_parts import LinearSpec, Segment

from .conftest import Base, randomise, tokens

SPEC = LinearSpec(
    in_features=6,
    segments=(Segment(name="q", size=4), Segment(name="k", size=3), Segment(name="v", size=5)),
    bias=True,
)


def linear(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> AdaptedLinear:
    """Scales of 0.5 on v and -2 on q."""
    changes = (("v", Lora(rank=2, alpha=1.0, dropout=dropout)), ("q", Lora(rank=3, alpha=-6.0, dropout=dropout)))
    adapt = Adapt(changes=changes)
    module = adapt.build(replace(SPEC, rewrite=adapt))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    assert module.bias is not None
    module.weight.data, module.bias.data = module.weight.data.to(dtype), module.bias.data.to(dtype)
    return module


def factors(module: AdaptedLinear, segment: str) -> tuple[Tensor, Tensor]:
    """A, and B with its scale, in fp64."""
    table, change = module.adapter[segment], module.changes[segment]
    assert isinstance(change, Lora)
    return table["lora_A"].double(), table["lora_B"].double() * change.scale


def formula(module: AdaptedLinear, x: Tensor) -> Tensor:
    """By the paper, segment by segment, in fp64."""
    wide = x.double()
    out = functional.linear(wide, module.weight.double(), module.bias.double())
    parts = []
    for segment, start, stop in module.spec.bounds():
        part = out[..., start:stop]
        if segment.name in module.changes:
            a, b = factors(module, segment.name)
            part = part + wide @ a.t() @ b.t()
        parts.append(part)
    return torch.cat(parts, -1)


@pytest.mark.parametrize("shape", [(1, 6), (7, 6), (2, 3, 6)])
def test_forward_and_gradients(shape: tuple[int, ...]) -> None:
    module, x = linear(), torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    leaves = [x, *module.parameters()]
    found = module(x)
    expected = formula(module, x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    dout = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    ours, theirs = torch.autograd.grad(found, leaves, dout), torch.autograd.grad(expected, leaves, dout.double())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_frozen_base_gets_no_gradient() -> None:
    module = linear()
    module.weight.requires_grad_(False)
    module.bias.requires_grad_(False)
    module(torch.randn(4, 6)).sum().backward()
    assert module.weight.grad is None and module.bias.grad is None
    assert len(grads := [p.grad for p in module.adapter.parameters()]) == 4 and None not in grads


def test_bf16_base() -> None:
    module, x = linear(dtype=torch.bfloat16), torch.randn(50, 6).bfloat16()
    out = module(x)
    assert out.dtype == torch.bfloat16
    # A, x A^T, the scaled B and the sum are each rounded to 8 bits; entries are of size 10.
    torch.testing.assert_close(out.double(), formula(module, x), rtol=2**-5, atol=0.25)
    out.float().sum().backward()
    assert {p.grad.dtype for p in module.adapter.parameters() if p.grad is not None} == {torch.float32}


def test_the_start_is_the_base(base: Callable[[str], Base]) -> None:
    made, ids = base("llama"), tokens(1, 9)

    def choose(modules: list[str]) -> dict[str, Lora]:
        return dict.fromkeys(match_targets(modules, ("q_proj", "down_proj")), Lora(rank=2, alpha=6.0, dropout=0.1))

    plain = load_decoder(made.path)
    states = []
    for seed in (1, 1, 2):
        model = load_decoder(made.path, rewrite=adapt_rewrite(choose))
        torch.manual_seed(len(states))
        attach(model, seed=seed)
        tables = [table for _, module in adapted_modules(model) for table in module.adapter.values()]
        states.append([table["lora_A"] for table in tables])
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(ids), plain(ids), rtol=0, atol=1e-5)
        assert len(tables) == 4 and not any(table["lora_B"].any() for table in tables)
        for a in states[-1]:
            bound = a.shape[1] ** -0.5
            assert bound / 2 < float(a.detach().abs().max()) <= bound
        assert [n for n, p in model.named_parameters() if p.requires_grad] == [
            n for n, _ in model.named_parameters() if ".adapter." in n
        ]
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True)), "the seed decides"
    assert not torch.equal(states[0][0], states[2][0])


def test_dropout_is_on_the_adapter_s_input_only() -> None:
    """Its mean over many draws is the map without dropout; the base's share is never dropped; eval drops nothing."""
    torch.manual_seed(0)
    module = linear(dropout=0.25)
    x = torch.ones(40_000, 6)
    exact, plain = formula(module, x[:1])[0], functional.linear(x[:1], module.weight, module.bias)[0]
    out = module.train()(x)
    # k has no adapter. (One row and many need not come from the same product, bit for bit.)
    torch.testing.assert_close(out[:, 4:7], plain[4:7].expand(len(x), 3), rtol=1e-6, atol=1e-6)
    draws = (out - plain).detach().double()[:, [0, 1, 2, 3, 7, 8, 9, 10, 11]]
    expected = (exact - plain)[[0, 1, 2, 3, 7, 8, 9, 10, 11]]
    error = draws.std(0) / len(x) ** 0.5
    assert bool(((draws.mean(0) - expected).abs() < 5 * error).all()) and bool((draws.std(0) > 0.1).all())
    # Each input survives with 3/4: the variance of one output is sum_i c_i^2 * p / (1 - p).
    a, b = factors(module, "q")
    variance = (b @ a).square().sum(1) * 0.25 / 0.75
    torch.testing.assert_close(draws.var(0)[:4], variance, rtol=0.05, atol=0)
    # As in PEFT each projection drops for itself.
    assert abs(float(torch.corrcoef(draws[:, [0, 4]].t())[0, 1])) < 0.03
    torch.testing.assert_close(module.eval()(x[:1]).double(), exact[None], rtol=1e-5, atol=1e-5)


def test_dropout_path_has_the_same_gradients() -> None:
    """With a dropout too small to strike."""
    module, x = linear(dropout=1e-9), torch.randn(5, 6, requires_grad=True)
    found = torch.autograd.grad(module.train()(x).square().sum(), [x, *module.parameters()])
    expected = torch.autograd.grad(module.eval()(x).square().sum(), [x, *module.parameters()])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_scales() -> None:
    assert lora_scale(16, 4, rslora=False) == 4.0
    assert lora_scale(16, 4, rslora=True) == 8.0


def adapted_model(base: Base, dtype: torch.dtype) -> Decoder:
    def choose(modules: list[str]) -> dict[str, Lora]:
        return {m: Lora(rank=3, alpha=2.1) for m in match_targets(modules, "all-linear") if "k_proj" not in m}

    model = load_decoder(base.path, dtype=dtype, rewrite=adapt_rewrite(choose)).eval()
    attach(model, seed=1)
    randomise((p for p in model.parameters() if p.requires_grad), seed=2, std=0.2)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_the_formula(base: Callable[[str], Base], name: str, dtype: torch.dtype) -> None:
    model = adapted_model(base(name), dtype)
    exact = {}
    for path, module in adapted_modules(model):
        weight = module.weight.detach().double()
        for segment, start, stop in module.spec.bounds():
            if segment.name in module.changes:
                a, b = factors(module, segment.name)
                weight[start:stop] += (b @ a).detach()
        exact[path] = weight
    assert len(exact) == 8
    merged = merge_adapter(model)
    assert merged is model and not list(adapted_modules(model))
    assert all(old.rewrite is None for _, old in linear_specs(model.spec))
    # fp32: a few roundings of sums of three; bf16: one rounding, half a unit in the last place.
    limit = 2**-22 if dtype == torch.float32 else 2**-8 * 1.001
    for path, weight in exact.items():
        module = model.get_submodule(path)
        assert type(module) is Linear and module.weight.dtype == dtype
        torch.testing.assert_close(module.weight.double(), weight, rtol=limit, atol=2e-7)


def test_proof(base: Callable[[str], Base]) -> None:
    model = adapted_model(base("llama"), torch.float32)
    prompts = [tokens(5).tolist(), tokens(9, seed=2).tolist()]
    adapted, plain = prompt_logits(model, prompts), base_logits(model, prompts)
    assert all(torch.equal(a, b) for a, b in zip(adapted, prompt_logits(model, prompts), strict=True)), "it is back"
    torch.testing.assert_close(torch.cat(plain), torch.cat(prompt_logits(load_decoder(base("llama").path), prompts)))
    merged = prompt_logits(merge_adapter(model), prompts)
    proof = prove(adapted, merged, plain)
    assert proof.num_positions == 14 and proof.top1_agreement == 1.0
    assert proof.max_logit_diff < 1e-4 and proof.max_kl < 1e-8 and proof.effect_kl > 0.01
    by_hand = functional.kl_div(
        torch.cat(plain).log_softmax(-1), torch.cat(adapted).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert proof.effect_kl == pytest.approx(float(by_hand), rel=1e-4)
    wrong = prove(adapted, plain, plain)
    assert wrong.mean_kl == wrong.effect_kl and wrong.max_logit_diff > 0.1 and wrong.max_kl >= wrong.mean_kl
