"""Muon, Adafactor, GaLore and APOLLO against their references, on fused and stacked parameters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor as TheirAdafactor

from oarsmith.training.optimizer import (
    AdafactorSettings,
    AdamWSettings,
    ApolloSettings,
    GaLoreSettings,
    MuonSettings,
    Optimizer,
    adafactor,
    apollo,
    galore,
    muon,
)
from oarsmith.training.optimizers.blocks import RowBlocks
from oarsmith.training.optimizers.muon import newton_schulz
from oarsmith.training.seeds import keyed_seed

LR, DECAY = 0.02, 0.1
# A plain matrix (wide), a fused one (q, k, v), one packed group by group, and stacked experts (tall); and a vector.
SHAPES = {"plain": (6, 10), "fused": (12, 7), "grouped": (12, 7), "experts": (3, 9, 5), "bias": (6,)}
BLOCKS = {
    "plain": RowBlocks(sizes=(6,)),
    "fused": RowBlocks(sizes=(6, 3, 3)),
    "grouped": RowBlocks(sizes=(2, 1, 1), groups=3),
    "experts": RowBlocks(sizes=(9,)),
}


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny matrices."""


def tensors(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def trained(optimizer: Optimizer, steps: int) -> dict[str, Tensor]:
    for step in range(steps):
        optimizer.step(tensors(100 + step), lr=LR, grad_scale=0.5)
    return {name: parameter.detach() for name, parameter in optimizer.parameters.items()}


def parameters() -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(tensor)) for name, tensor in tensors(0).items()]


def matrices(name: str, tensor: Tensor) -> list[Tensor]:
    """The matrices in a parameter, cut out by hand."""
    if name == "plain":
        return [tensor]
    if name == "fused":
        return [tensor[:6], tensor[6:9], tensor[9:]]
    if name == "grouped":
        rows = [[0, 1, 4, 5, 8, 9], [2, 6, 10], [3, 7, 11]]
        return [tensor[index] for index in rows]
    assert name == "experts"
    return list(tensor)


def compare(found: dict[str, Tensor], reference: dict[str, list[Tensor]], *, rtol: float, atol: float) -> None:
    for name, expected in reference.items():
        for index, (have, want) in enumerate(zip(matrices(name, found[name]), expected, strict=True)):
            torch.testing.assert_close(
                have, want.detach().to(have.dtype), rtol=rtol, atol=atol, msg=lambda m, n=name, i=index: f"{n}/{i}: {m}"
            )


def vectors_are_adamw(found: dict[str, Tensor], steps: int) -> None:
    weight = tensors(0)["bias"].requires_grad_()
    reference = torch.optim.AdamW([weight], lr=LR, weight_decay=0.0)
    for step in range(steps):
        weight.grad = tensors(100 + step)["bias"] * 0.5
        reference.step()
    torch.testing.assert_close(found["bias"], weight.detach(), rtol=1e-5, atol=1e-6)


def test_muon_is_torchs() -> None:
    steps, others = 4, AdamWSettings(weight_decay=DECAY)
    found = trained(muon(parameters(), MuonSettings(others=others), BLOCKS), steps)
    reference = {name: [p.clone().requires_grad_() for p in matrices(name, tensors(0)[name])] for name in BLOCKS}
    theirs = torch.optim.Muon(
        [p for parts in reference.values() for p in parts],
        lr=LR,
        weight_decay=DECAY,
        adjust_lr_fn="match_rms_adamw",
    )
    for step in range(steps):
        for name, parts in reference.items():
            for part, grad in zip(parts, matrices(name, tensors(100 + step)[name] * 0.5), strict=True):
                part.grad = grad.clone()
        theirs.step()
    # An update has elements of size lr; its products are bf16, whose rounding (2^-8) five Newton-Schulz steps amplify.
    compare(found, reference, rtol=0, atol=steps * LR * 2**-5)
    vectors_are_adamw(found, steps)


def test_muon_is_the_formula() -> None:
    """In float64, with products in fp32: what bf16 hides in the comparison with PyTorch."""
    steps, settings = 4, MuonSettings(products=torch.float32, others=AdamWSettings(weight_decay=DECAY))
    found = trained(muon(parameters(), settings, BLOCKS), steps)
    reference = {}
    for name in BLOCKS:
        reference[name] = []
        for index, start in enumerate(matrices(name, tensors(0)[name])):
            weight, momentum = start.double(), torch.zeros_like(start).double()
            for step in range(steps):
                grad = matrices(name, tensors(100 + step)[name])[index].double() * 0.5
                momentum = 0.95 * momentum + 0.05 * grad
                x = 0.05 * grad + 0.95 * momentum
                x = x / x.norm()
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                weight = weight * (1 - LR * DECAY) - LR * 0.2 * math.sqrt(max(x.shape)) * x
            reference[name].append(weight)
    compare(found, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (4, 6, 6), (1, 5)])
def test_newton_schulz_orthogonalises(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = newton_schulz(matrix, 5, torch.float32)
    values = torch.linalg.svdvals(found)
    # Keller Jordan's coefficients trade exactness for speed: singular values end between 0.7 and 1.2.
    assert found.shape == shape and float(values.min()) > 0.6 and float(values.max()) < 1.3
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert float((found * (u @ vh)).sum() / (found.norm() * (u @ vh).norm())) > 0.97
    assert not newton_schulz(torch.zeros(shape), 5, torch.bfloat16).any()


@pytest.mark.parametrize("beta1", [None, 0.9])
def test_adafactor_is_transformers(beta1: float | None) -> None:
    steps = 6
    settings = AdafactorSettings(weight_decay=DECAY, beta1=beta1)
    fused = {name: blocks for name, blocks in BLOCKS.items() if name in ("fused", "grouped")}
    found = trained(adafactor(parameters(), settings, fused), steps)
    reference = {name: [p.clone().requires_grad_() for p in matrices(name, tensors(0)[name])] for name in BLOCKS}
    bias = tensors(0)["bias"].requires_grad_()
    own: dict[str, object] = {"lr": LR, "relative_step": False, "scale_parameter": False, "beta1": beta1}
    decayed = TheirAdafactor([p for parts in reference.values() for p in parts], weight_decay=DECAY, **own)
    spared = TheirAdafactor([bias], **own)
    for step in range(steps):
        for name, parts in reference.items():
            for part, grad in zip(parts, matrices(name, tensors(100 + step)[name] * 0.5), strict=True):
                part.grad = grad.clone()
        bias.grad = tensors(100 + step)["bias"] * 0.5
        decayed.step()
        spared.step()
    compare(found, reference, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(found["bias"], bias.detach(), rtol=1e-5, atol=2e-6)


def test_adafactor_stores_rows_and_columns() -> None:
    optimizer = adafactor(parameters(), AdafactorSettings(), {})
    shapes = {name: tuple(tensor.shape) for name, tensor in optimizer.state_tensors().items()}
    assert shapes["plain/row.0"] == (6,) and shapes["plain/column.0"] == (10,)
    assert shapes["experts/row.0"] == (3, 9) and shapes["experts/column.0"] == (3, 5)
    assert shapes["bias/exp_avg_sq.0"] == (6,) and len(shapes) == 9


def test_galore_is_the_paper() -> None:
    """Algorithm 2 with the authors' AdamW, in float64."""
    steps, refresh, rank, scale = 5, 2, 3, 0.25
    adam = AdamWSettings(beta2=0.99, eps=1e-6, weight_decay=DECAY)
    found = trained(
        galore(parameters(), GaLoreSettings(rank=rank, steps=refresh, scale=scale, adam=adam), BLOCKS), steps
    )
    reference = {}
    for name in BLOCKS:
        reference[name] = []
        for index, start in enumerate(matrices(name, tensors(0)[name])):
            weight, m, v, basis = start.double(), 0.0, 0.0, torch.empty(0)
            for step in range(steps):
                grad = matrices(name, tensors(100 + step)[name])[index].double() * 0.5
                tall = grad.shape[0] >= grad.shape[1]
                if step % refresh == 0:
                    # In fp32, because signs are arbitrary and moments live on in the next basis.
                    u, _, vh = torch.linalg.svd(grad.float(), full_matrices=False)
                    basis = (vh[:rank] if tall else u[:, :rank]).double()
                low = grad @ basis.T if tall else basis.T @ grad
                m, v = 0.9 * m + 0.1 * low, 0.99 * v + 0.01 * low**2
                normed = m / (v.sqrt() + 1e-6)
                back = normed @ basis if tall else basis @ normed
                size = LR * math.sqrt(1 - 0.99 ** (step + 1)) / (1 - 0.9 ** (step + 1))
                weight = weight * (1 - LR * DECAY) - size * scale * back
            reference[name].append(weight)
    compare(found, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scaling", ["channel", "tensor"])
def test_apollo_is_the_authors_code(scaling: str) -> None:
    """apollo-torch's AdamW with its random projector, in float64; only the seeds of the projection are ours."""
    steps, refresh, rank, scale = 5, 2, 3 if scaling == "channel" else 1, 1.7
    adam = AdamWSettings(beta2=0.99, eps=1e-6, weight_decay=DECAY)
    settings = ApolloSettings(rank=rank, steps=refresh, scale=scale, scaling=scaling, seed=5, adam=adam)
    found = trained(apollo(parameters(), settings, BLOCKS), steps)
    reference = {}
    limited = 0
    for name in BLOCKS:
        reference[name] = []
        parts = matrices(name, tensors(0)[name])
        for index, start in enumerate(parts):
            weight, m, v, norm_before = start.double(), 0.0, 0.0, None
            for step in range(steps):
                grad = matrices(name, tensors(100 + step)[name])[index].double() * 0.5
                tall = grad.shape[0] >= grad.shape[1]
                projection = drawn(name, index, min(grad.shape), rank, step // refresh)
                low = grad @ projection if tall else projection.T @ grad
                m, v = 0.9 * m + 0.1 * low, 0.99 * v + 0.01 * low**2
                normed = m / (v.sqrt() + 1e-6)
                if scaling == "tensor":
                    factor = normed.norm() / (low.norm() + 1e-8)
                else:
                    axis = 1 if tall else 0
                    factor = (normed.norm(dim=axis) / (low.norm(dim=axis) + 1e-8)).unsqueeze(axis)
                scaled = grad * factor
                if norm_before is not None:
                    limiter = max(float(scaled.norm() / (norm_before + 1e-8)), 1.01) / 1.01
                    limited += limiter > 1
                    scaled = scaled / limiter
                norm_before = scaled.norm()
                size = LR * math.sqrt(1 - 0.99 ** (step + 1)) / (1 - 0.9 ** (step + 1))
                weight = weight * (1 - LR * DECAY) - size * scale * scaled
            reference[name].append(weight)
    assert limited > 5, "the limiter is at work"
    compare(found, reference, rtol=1e-4, atol=1e-5)


def drawn(name: str, index: int, short: int, rank: int, refresh: int) -> Tensor:
    """Experts are drawn together."""
    experts = name == "experts"
    key = f"apollo/{name}/{0 if experts else index}"
    generator = torch.Generator().manual_seed(keyed_seed(5, key, refresh))
    shape = (3, short, rank) if experts else (short, min(rank, short))
    values = torch.randn(shape, generator=generator).double() / math.sqrt(min(rank, short))
    return values[index] if experts else values


def test_apollo_projections_are_keyed() -> None:
    """Another seed, matrix or refresh draws other numbers; the same, the same."""
    adam = AdamWSettings()

    def moments(seed: int, steps: int) -> dict[str, Tensor]:
        optimizer = apollo(parameters(), ApolloSettings(rank=2, steps=3, seed=seed, adam=adam), BLOCKS)
        same = {name: torch.ones(shape) for name, shape in SHAPES.items()}
        for _ in range(steps):
            optimizer.step(same, lr=0.0, grad_scale=1.0)
        return optimizer.state_tensors()

    first, again, other = moments(1, 1), moments(1, 1), moments(2, 1)
    assert torch.equal(first["plain/exp_avg.0"], again["plain/exp_avg.0"])
    assert not torch.equal(first["plain/exp_avg.0"], other["plain/exp_avg.0"])
    assert not torch.equal(first["fused/exp_avg.1"], first["fused/exp_avg.2"])
    # The same gradient three times through one projection keeps the direction of the moment; the fourth has another.
    kept, moved = moments(1, 3)["plain/exp_avg.0"], moments(1, 4)["plain/exp_avg.0"]
    direction = first["plain/exp_avg.0"] / first["plain/exp_avg.0"].norm()
    torch.testing.assert_close(kept / kept.norm(), direction)
    assert float((moved / moved.norm() - direction).norm()) > 0.01


def test_low_rank_state_is_small() -> None:
    wide = [("w", nn.Parameter(torch.zeros(64, 256)))]
    blocks = {"w": RowBlocks(sizes=(64,))}
    of_galore = galore(wide, GaLoreSettings(rank=4), blocks).state_tensors()
    assert sum(t.numel() for t in of_galore.values()) == 2 * 4 * 256 + 64 * 4
    of_apollo = apollo(wide, ApolloSettings(rank=4), blocks).state_tensors()
    assert sum(t.numel() for t in of_apollo.values()) == 2 * 4 * 256 + 1


def test_an_expert_without_a_gradient_waits() -> None:
    """Its first gradient comes at step 3: the limiter must not hold it to a growth of 1 % from nothing."""
    weight = nn.Parameter(torch.zeros(2, 8, 4))
    optimizer = apollo([("w", weight)], ApolloSettings(rank=2), {"w": RowBlocks(sizes=(8,))})
    for step in range(4):
        grad = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(step))
        if step < 2:
            grad[1] = 0
        optimizer.step({"w": grad}, lr=0.1, grad_scale=1.0)
    assert float(weight[1].detach().abs().mean()) > 0.01


def test_split_and_join() -> None:
    for name, blocks in BLOCKS.items():
        tensor = tensors(1)[name]
        parts = blocks.split(tensor)
        cut = [tensor] if name == "experts" else matrices(name, tensor)
        assert all(torch.equal(part, expected) for part, expected in zip(parts, cut, strict=True))
        assert torch.equal(blocks.join(parts), tensor)
        np.testing.assert_array_equal(blocks.join(parts).shape, tensor.shape)
