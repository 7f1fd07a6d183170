"""Fast paths beside their twins: the same inputs through both, outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from oarsmith.kernels.select import describe, library, using

Compare = Callable[..., None]
# fp32: sums run in another order. bf16 (8 bits of mantissa): two roundings of the result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Inputs are tiny here; tests of several threads set their number themselves."""


@pytest.fixture
def native() -> Iterator[None]:
    """Run with the compiled kernels, and with them only."""
    if library() is None:
        pytest.skip(describe())
    with using("native"):
        yield


def run(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dout: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradient of every input."""
    leaves = [x.detach().requires_grad_() for x in inputs]  # the same strides
    out = function(*leaves)
    grads = torch.autograd.grad(out, leaves, dout.to(out.dtype))
    return (out.detach(), *grads)


@pytest.fixture
def compare(native: None) -> Compare:
    """compare(fast, twin, *inputs): the twin computes in fp32, so bf16 results are held against the exact ones."""

    def check(
        fast: Callable[..., Tensor], twin: Callable[..., Tensor], *inputs: Tensor, tolerance: float | None = None
    ) -> None:
        dtype = inputs[0].dtype
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            dout = torch.randn(fast(*inputs).shape, generator=generator).to(dtype)
        found = run(fast, inputs, dout)
        again = run(fast, inputs, dout)
        with using("torch"):
            expected = run(twin, tuple(x.float() for x in inputs), dout.float())
        limit = TOLERANCE[dtype] if tolerance is None else tolerance
        for index, (have, want) in enumerate(zip(found, expected, strict=True)):
            assert have.dtype == dtype and have.shape == want.shape, index
            scale = max(float(want.abs().max()), 1.0) if want.numel() else 1.0
            torch.testing.assert_close(
                have.float(), want, rtol=limit, atol=limit * scale, msg=lambda m, i=index: f"{i}: {m}"
            )
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "the same call twice differs"

    return check


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
