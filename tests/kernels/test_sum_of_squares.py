"""The squared norm of a tensor against float64."""

from __future__ import annotations

import math

import pytest
import torch

from oarsmith.kernels import sum_of_squares
from oarsmith.kernels.select import using

from .conftest import randn


@pytest.mark.parametrize("shape", [(0,), (1,), (33, 7), (70_001,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_as_float64(native: None, shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    x = randn(*shape, dtype=dtype)
    with using("native" if backend == "native" else "torch"):
        found = sum_of_squares(x)
    assert found.dtype == torch.float64
    # fp32 sums of thousands of terms.
    assert float(found) == pytest.approx(float(x.double().square().sum()), rel=1e-5)


def test_the_same_for_any_number_of_threads(native: None) -> None:
    x = randn(200_003, dtype=torch.bfloat16)
    found = set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.add(float(sum_of_squares(x)))
    torch.set_num_threads(1)
    assert len(found) == 1


def test_views(native: None) -> None:
    x = randn(30, 20, dtype=torch.bfloat16)
    assert float(sum_of_squares(x.t())) == pytest.approx(float(sum_of_squares(x)), rel=1e-6)
    assert float(sum_of_squares(torch.ones((), dtype=torch.bfloat16).expand(5, 5))) == 25


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
def test_what_is_not_finite_is_seen(native: None, value: float) -> None:
    x = torch.ones(40_000, dtype=torch.bfloat16)
    x[20_000] = value
    assert not math.isfinite(float(sum_of_squares(x)))
