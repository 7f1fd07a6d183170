"""Mixtures of experts against a loop over tokens in float64: who is chosen, with what weight, and all gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.models.families.parts import gated_mlp
from oarsmith.models.moe import MixtureOfExperts
from oarsmith.models.spec_parts import ExpertGroups, MoE, RouterSpec

HIDDEN, INNER, EXPERTS = 12, 10, 8
PLAIN = RouterSpec(num_experts=EXPERTS, top_k=3)
ROUTERS = {
    "softmax over the chosen": PLAIN,
    "softmax as it is": replace(PLAIN, normalize=False),
    "one expert": replace(PLAIN, top_k=1),
    "all experts": replace(PLAIN, top_k=EXPERTS),
    "scaled": replace(PLAIN, scale=2.5, bias=True),
    "best group by its best": replace(
        PLAIN, normalize=False, scale=4.0, groups=ExpertGroups(num_groups=4, kept=2, best=1)
    ),
    "sigmoid with correction": replace(PLAIN, score="sigmoid", correction=True),
    "sigmoid, groups by two, correction": replace(
        PLAIN, score="sigmoid", scale=2.5, correction=True, groups=ExpertGroups(num_groups=4, kept=2, best=2)
    ),
}


def build(router: RouterSpec, *, shared: bool = False) -> MixtureOfExperts:
    """Every weight random, the correction too."""
    spec = MoE(
        router=router,
        experts=gated_mlp(HIDDEN, INNER, "silu", experts=router.num_experts, bias=True),
        shared=gated_mlp(HIDDEN, 2 * INNER, "silu") if shared else None,
        shared_gate=shared,
    )
    module, generator = MixtureOfExperts(spec), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return module


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def choose(spec: RouterSpec, scores: list[float], correction: list[float]) -> list[int]:
    """The experts of one token, written as the papers say it."""
    biased = [score + extra for score, extra in zip(scores, correction, strict=True)]
    allowed = list(range(spec.num_experts))
    if spec.groups is not None:
        size = spec.num_experts // spec.groups.num_groups
        members = [list(range(g * size, (g + 1) * size)) for g in range(spec.groups.num_groups)]
        worth = [sum(sorted((biased[e] for e in group), reverse=True)[: spec.groups.best]) for group in members]
        kept = sorted(range(len(members)), key=lambda g: worth[g], reverse=True)[: spec.groups.kept]
        allowed = [expert for group in kept for expert in members[group]]
    return sorted(allowed, key=lambda e: biased[e], reverse=True)[: spec.top_k]


def gated(x: Tensor, gate_up: Tensor, gate_up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None) -> Tensor:
    gate, up = functional.linear(x, gate_up, gate_up_bias).chunk(2, -1)
    return functional.linear(functional.silu(gate) * up, down, down_bias)


def plain(spec: MoE, weights: dict[str, Tensor], x_TD: Tensor) -> Tensor:
    """One token and one expert at a time, in the dtype of the weights."""
    rows = []
    for x_D in x_TD:
        logits = functional.linear(x_D, weights["router.weight"], weights.get("router.bias"))
        scores = logits.softmax(-1) if spec.router.score == "softmax" else logits.sigmoid()
        correction = weights.get("router.correction", torch.zeros(spec.router.num_experts))
        chosen = choose(spec.router, scores.tolist(), correction.tolist())
        total = sum(scores[e] for e in chosen) if spec.router.normalize else 1.0
        row = torch.zeros_like(x_D)
        for e in chosen:
            parts = [weights[f"experts.{name}"][e] for name in ("gate_up.weight", "gate_up.bias")]
            parts += [weights[f"experts.{name}"][e] for name in ("down.weight", "down.bias")]
            row = row + spec.router.scale * scores[e] / total * gated(x_D, *parts)
        if spec.shared is not None:
            out = gated(x_D, weights["shared.gate_up.weight"], None, weights["shared.down.weight"], None)
            row = row + functional.linear(x_D, weights["shared_gate.weight"]).sigmoid() * out
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_routing_and_gradients(name: str, shared: bool) -> None:
    module, x_TD = build(ROUTERS[name], shared=shared), tokens(17).requires_grad_()
    exact = {key: value.detach().double().requires_grad_() for key, value in module.named_parameters()}
    y_TD = x_TD.detach().double().requires_grad_()
    found, expected = module(x_TD), plain(module.spec, exact, y_TD)
    # fp32 against fp64: sums of a few dozen terms near 1.
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(9))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    pairs = {"x": (x_TD.grad, y_TD.grad), **{k: (p.grad, exact[k].grad) for k, p in module.named_parameters()}}
    for key, (ours, theirs) in pairs.items():
        if key == "router.correction":
            assert ours is None, "the correction is never moved by the loss"
            continue
        assert ours is not None and theirs is not None, key
        limit = 1e-5 * max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=limit, msg=lambda m, k=key: f"{k}: {m}")


@torch.no_grad()
def test_the_correction_changes_the_choice_and_not_the_weights() -> None:
    module, x_TD = build(ROUTERS["sigmoid with correction"]), tokens(1)
    assert module.router.correction is not None and module.router.correction.dtype == torch.float32
    module.router.correction.zero_()
    module.router.correction[:3] = 5.0
    weights, chosen = module.router(x_TD)
    assert sorted(chosen[0].tolist()) == [0, 1, 2]
    scores = functional.linear(x_TD, module.router.weight).sigmoid()[0, chosen[0]]
    torch.testing.assert_close(weights[0], scores / scores.sum())


@pytest.mark.parametrize("name", ROUTERS)
@torch.no_grad()
def test_order_and_company_do_not_matter(name: str) -> None:
    """A token's output is its own: in any order of the batch, and alone."""
    module, x_TD = build(ROUTERS[name], shared=True), tokens(23)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(2))
    together = module(x_TD)
    # A product over more rows may be blocked differently.
    torch.testing.assert_close(module(x_TD[order]), together[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module(x_TD[5:6]), together[5:6], rtol=1e-5, atol=1e-5)
    assert torch.equal(module(x_TD), together)


def test_an_expert_without_tokens() -> None:
    """Its gradient is zero, not missing: on another rank the same expert may have some."""
    module, x_TD = build(ROUTERS["sigmoid with correction"]), tokens(6)
    assert module.router.correction is not None
    with torch.no_grad():
        module.router.correction[4] = -100.0
        module.router.correction[7] = -100.0
    module(x_TD).square().sum().backward()
    for parameter in module.experts.parameters():
        assert parameter.grad is not None
        used = parameter.grad.flatten(1).abs().sum(1) > 0
        assert not used[4] and not used[7] and bool(parameter.grad.isfinite().all())
    assert int((module.experts.down.weight.grad.flatten(1).abs().sum(1) > 0).sum()) >= 4


@torch.no_grad()
def test_scores_stay_fp32_in_bf16() -> None:
    """The choice is that of the stored weights and inputs, not of rounded scores."""
    module, x_TD = build(PLAIN), tokens(64).bfloat16()
    module = module.bfloat16()
    weights, chosen = module.router(x_TD)
    exact = functional.linear(x_TD.double(), module.router.weight.double()).softmax(-1).topk(3).indices
    assert weights.dtype == torch.float32 and torch.equal(chosen, exact)
    assert module(x_TD).dtype == torch.bfloat16
