"""Fake quantization: what comes out, and which gradients come back."""

from __future__ import annotations

import pytest
import torch

from oarsmith.quantize.activations import round_activations
from oarsmith.quantize.fake import Pact, fake_activations, fake_weight
from oarsmith.quantize.grid import Grid, quantize, range_steps
from oarsmith.quantize.scheme import Activations

GRIDS = [Grid(group=16), Grid(group=20, symmetric=True), Grid(code="e4m3", bits=8, group=None)]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_their_gradients(grid: Grid, dtype: torch.dtype) -> None:
    weight, dout = randn(6, 48).to(dtype).requires_grad_(), randn(6, 48, seed=1).to(dtype)
    for steps in (None, range_steps(weight.detach() / 2, grid)):
        weight.grad = None
        out = fake_weight(weight, grid, steps)
        assert out.dtype is dtype
        torch.testing.assert_close(out, quantize(weight.detach(), grid, steps).dense().to(dtype), rtol=0, atol=2**-7)
        out.backward(dout)
        assert weight.grad is not None and torch.equal(weight.grad, dout)


@pytest.mark.parametrize("how", [Activations(), Activations(code="e4m3"), Activations(code="e4m3", group=8)])
def test_dynamic_activations(how: Activations) -> None:
    x, dout = randn(5, 16).requires_grad_(), randn(5, 16, seed=1)
    out = fake_activations(x, how)
    torch.testing.assert_close(out, round_activations(x.detach(), how))
    out.backward(dout)
    assert x.grad is not None and torch.equal(x.grad, dout)


@pytest.mark.parametrize(("code", "largest"), [("int", 127), ("e4m3", 448)])
def test_static_activations_have_no_gradient_beyond_their_range(code: str, largest: int) -> None:
    how = Activations(code=code, static=True)  # type: ignore[arg-type]
    x = torch.tensor([[-largest - 5.0, 1.3, largest + 40.0]], requires_grad=True)
    out = fake_activations(x, how, torch.tensor(1.0))
    assert out[0, 0] == -largest and out[0, 2] == largest
    out.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[0.0, 1.0, 0.0]]


def test_pact_by_hand() -> None:
    pact = Pact(12.7)
    x = torch.tensor([1.234, -3.0, 20.0, -15.0, 14.0], requires_grad=True)
    out = pact(x)
    assert out.tolist() == pytest.approx([1.2, -3.0, 12.7, -12.7, 12.7])
    out.backward(torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0]))
    assert x.grad is not None and x.grad.tolist() == [1.0, 2.0, 0.0, 0.0, 0.0]
    # 3 - 5 + 7
    assert float(pact.clip.grad) == 5.0
    assert Pact().clip.item() == 20.0


def test_pact_learns_where_to_cut() -> None:
    # One outlier: cut, the others have finer steps.
    x = torch.cat([randn(5000), torch.tensor([20.0])])
    pact = Pact()
    optimizer = torch.optim.SGD(pact.parameters(), lr=0.5)
    first = (pact(x) - x)[:-1].square().mean().item()
    for _ in range(200):
        optimizer.zero_grad()
        # The loss of the others, and a pull on the limit as PACT's regularization has.
        ((pact(x) - x)[:-1].square().mean() + 0.01 * pact.clip.square()).backward()
        optimizer.step()
    assert 0.5 < float(pact.clip) < 6
    assert float((Pact(4.0)(x) - x)[:-1].square().mean()) < first


def test_pact_in_bf16_and_beyond_zero() -> None:
    x = randn(4, 8).bfloat16().requires_grad_()
    out = Pact()(x)
    assert out.dtype is torch.bfloat16
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype is torch.bfloat16
    assert Pact(-1.0)(x).detach().abs().max() < 1e-5
