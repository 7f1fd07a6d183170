"""Subtracting from the fp32 master of a weight. Joining and splitting: test_adamw.py."""

from __future__ import annotations

import pytest
import torch

from oarsmith.kernels.masters import join_master, split_master, subtract
from oarsmith.kernels.select import using

from .conftest import randn


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("shape", [(1,), (7, 13), (300, 101)])
def test_a_bf16_weight_follows_its_fp32_master(native: None, shape: tuple[int, ...], backend: str) -> None:
    weight = randn(*shape).bfloat16()
    low, master = torch.zeros(shape, dtype=torch.int16), weight.float()
    exact = master.double()
    with using("native" if backend == "native" else "torch"):
        for seed in range(1, 6):
            delta = randn(*shape, seed=seed) * 1e-5
            subtract(weight, low, delta, 0.999)
            subtract(master, None, delta, 0.999)
            exact = exact * 0.999 - delta.double()
    assert torch.equal(join_master(weight, low), master)
    # Five roundings of fp32, and of 0.999 to fp32.
    torch.testing.assert_close(master.double(), exact, rtol=1e-6, atol=1e-9)


def test_transposed_weights_and_deltas(native: None) -> None:
    weight, low = randn(6, 4).bfloat16(), torch.zeros(6, 4, dtype=torch.int16)
    split_master(randn(6, 4), weight, low)
    before, delta = join_master(weight, low), randn(4, 6, seed=1)
    subtract(weight, low, delta.t(), 1.0)
    torch.testing.assert_close(join_master(weight, low), before - delta.t(), rtol=1e-6, atol=1e-7)
    whole = randn(4, 6)
    expected = whole.t() - delta.t()
    subtract(whole.t(), None, delta.t(), 1.0)
    torch.testing.assert_close(whole.t(), expected, rtol=1e-6, atol=1e-7)


def test_nan_stays(native: None) -> None:
    weight, low = torch.ones(40).bfloat16(), torch.zeros(40, dtype=torch.int16)
    delta = torch.zeros(40)
    delta[3] = torch.nan
    subtract(weight, low, delta, 1.0)
    assert weight.isnan().nonzero().flatten().tolist() == [3]
