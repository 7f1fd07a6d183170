"""The AdamW step against torch.optim.AdamW, and the bf16 weights with their exact fp32 masters."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from oarsmith.kernels import AdamWRule, adamw_step
from oarsmith.kernels.masters import join_master, split_master
from oarsmith.kernels.select import library, using

from .conftest import randn

SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "native" and library() is None:
        pytest.skip("no compiled kernels here")
    with using(request.param):
        yield request.param


def rule(step: int, grad_scale: float = 1.0, **changes: float) -> AdamWRule:
    return AdamWRule(step=step, grad_scale=grad_scale, **{**SETTINGS, **changes})


def torch_adamw(start: Tensor, grads: list[Tensor]) -> Tensor:
    weight = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW(
        [weight], lr=SETTINGS["lr"], betas=(0.9, 0.99), eps=SETTINGS["eps"], weight_decay=SETTINGS["weight_decay"]
    )
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("shape", [(1,), (7, 13), (3, 5, 2)])
@pytest.mark.parametrize("grad_scale", [1.0, 0.25])
def test_fp32_is_torch_adamw(backend: str, shape: tuple[int, ...], grad_scale: float) -> None:
    start, grads = randn(*shape), [randn(*shape, seed=10 + i) for i in range(20)]
    weight, m, v = start.clone(), torch.zeros(shape), torch.zeros(shape)
    for step, grad in enumerate(grads, start=1):
        adamw_step(weight, None, grad, m, v, rule(step, grad_scale))
    # 20 steps of 1e-2 with fp32 arithmetic in another order: 1 - beta2 alone is off by 1e-6 relative in fp32.
    torch.testing.assert_close(weight, torch_adamw(start, [g * grad_scale for g in grads]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_bf16_weights_follow_their_fp32_masters(backend: str, grad_dtype: torch.dtype) -> None:
    """Updates of 1e-5, which bf16 weights of size 1 alone would lose, every one."""
    start = randn(9, 31).bfloat16()
    grads = [randn(9, 31, seed=10 + i, dtype=grad_dtype) for i in range(30)]
    weight, low = start.clone(), torch.zeros(9, 31, dtype=torch.int16)
    moments = torch.zeros(9, 31), torch.zeros(9, 31)
    master, master_moments = start.float(), (torch.zeros(9, 31), torch.zeros(9, 31))
    for step, grad in enumerate(grads, start=1):
        adamw_step(weight, low, grad, *moments, rule(step, lr=1e-5))
        adamw_step(master, None, grad, *master_moments, rule(step, lr=1e-5))
    joined = join_master(weight, low)
    assert torch.equal(joined, master), "the master of a bf16 weight is the fp32 weight, bit for bit"
    assert torch.equal(moments[0], master_moments[0]) and torch.equal(moments[1], master_moments[1])
    assert not torch.equal(joined, start.float())
    assert float((weight.float() - joined).abs().max()) <= float((joined.abs() * 2**-8).max())


def test_native_step_is_the_twin(native: None) -> None:
    results = []
    for backend in ("native", "torch"):
        weight, low = randn(101).bfloat16(), torch.zeros(101, dtype=torch.int16)
        m, v = torch.zeros(101), torch.zeros(101)
        with using("native" if backend == "native" else "torch"):
            for step in range(1, 6):
                adamw_step(weight, low, randn(101, seed=step, dtype=torch.bfloat16), m, v, rule(step, 0.5))
        results.append((join_master(weight, low), m, v))
    for fast, twin in zip(*results, strict=True):
        torch.testing.assert_close(fast, twin, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_gradients_of_any_dtype_and_layout(backend: str, dtype: torch.dtype) -> None:
    weight, m, v = randn(6, 4), torch.zeros(6, 4), torch.zeros(6, 4)
    grad = randn(4, 6, seed=1).bfloat16().to(dtype)
    expected = torch_adamw(weight, [grad.t().float()])
    adamw_step(weight, None, grad.t(), m, v, rule(1))
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)


def test_a_parameter_that_is_a_view(backend: str) -> None:
    whole = randn(4, 6)
    expected = torch_adamw(whole.t()[1:5], [randn(4, 4, seed=1)])
    before = whole.clone()
    adamw_step(whole.t()[1:5], None, randn(4, 4, seed=1), torch.zeros(4, 4), torch.zeros(4, 4), rule(1))
    torch.testing.assert_close(whole.t()[1:5], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(whole[:, 0], before[:, 0])


def test_a_nan_gradient_does_not_vanish(backend: str) -> None:
    grad = torch.tensor([1.0, math.nan, math.inf])
    weight, low = torch.ones(3).bfloat16(), torch.zeros(3, dtype=torch.int16)
    adamw_step(weight, low, grad, torch.zeros(3), torch.zeros(3), rule(1))
    assert weight.isnan().tolist() == [False, True, True]
    assert join_master(weight, low).isnan().tolist() == [False, True, True]


def test_a_weight_without_its_remainder_is_refused(backend: str) -> None:
    with pytest.raises(AssertionError):
        adamw_step(torch.ones(3).bfloat16(), None, torch.ones(3), torch.zeros(3), torch.zeros(3), rule(1))


def boundary_bits() -> Tensor:
    """Every bf16 value with the remainders around zero, the rounding border and the ends: 2^16 x 12 fp32 patterns."""
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    low = torch.tensor([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xC000, 0xFFFD, 0xFFFE, 0xFFFF])
    return (high[:, None] | low.to(torch.int32)).flatten()


def test_join_and_split_lose_nothing() -> None:
    bits = boundary_bits()
    weight, low = torch.empty(len(bits), dtype=torch.bfloat16), torch.empty(len(bits), dtype=torch.int16)
    split_master(bits.view(torch.float32), weight, low)
    assert torch.equal(join_master(weight, low).view(torch.int32), bits)
    finite = bits.view(torch.float32).isfinite()
    exact, nearest = bits.view(torch.float32)[finite].double(), bits.view(torch.float32)[finite].bfloat16().double()
    ours = weight[finite].double()
    # Nearest, as bf16() rounds; only a tie may go the other way. At the top of the range both round to infinity.
    same = (ours == nearest) | ((ours - exact).abs() == (nearest - exact).abs())
    assert bool(same.all())


def test_bf16_weights_are_their_own_masters_at_first() -> None:
    """A remainder of zero: a model just loaded. Also for infinities and NaNs, bit for bit."""
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    low = torch.zeros(len(weight), dtype=torch.int16)
    master = join_master(weight, low)
    finite = ~weight.isnan()
    assert torch.equal(master[finite], weight[finite].float()) and bool(master[~finite].isnan().all())
    again, remainder = torch.empty_like(weight), torch.empty_like(low)
    split_master(master, again, remainder)
    assert torch.equal(again.view(torch.int16), weight.view(torch.int16)) and not remainder.any()


def test_native_split_is_the_twin_on_every_boundary(native: None) -> None:
    """A step that changes nothing (lr 0, no decay) passes each master through the kernel's join and split."""
    bits = boundary_bits()
    numbers = bits.view(torch.float32)
    bits = bits[numbers.isfinite() & (numbers.abs() >= torch.finfo(torch.float32).tiny)].clone()
    weight, low = torch.empty(len(bits), dtype=torch.bfloat16), torch.empty(len(bits), dtype=torch.int16)
    split_master(bits.view(torch.float32), weight, low)
    before = weight.clone(), low.clone()
    zeros = torch.zeros(len(bits))
    adamw_step(weight, low, zeros.clone(), zeros.clone(), zeros.clone(), rule(1, lr=0.0, weight_decay=0.0))
    assert torch.equal(weight.view(torch.int16), before[0].view(torch.int16)) and torch.equal(low, before[1])
