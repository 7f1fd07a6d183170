"""Searching steps and rounding columns: the kernels beside their twins."""

from __future__ import annotations

import pytest
import torch

from oarsmith.kernels.integer_steps import (
    ColumnSteps,
    fit_sums,
    fit_sums_reference,
    round_columns,
    round_columns_reference,
    shrink_losses,
    shrink_losses_reference,
)

from .conftest import randn


@pytest.mark.parametrize(("sizes", "group"), [((3, 7), 4), ((5, 64), 64), ((70, 576), 64), ((1, 1), 1), ((0, 8), 8)])
@pytest.mark.parametrize("zeros", [False, True])
def test_losses_and_fits(native: None, sizes: tuple[int, int], group: int, zeros: bool) -> None:
    weight, groups = randn(*sizes), -(-sizes[1] // group)
    scale = randn(sizes[0], groups, seed=1).abs() / 8 + 0.05
    scale *= 1 if zeros else randn(sizes[0], groups, seed=2).sign()
    zero = randn(sizes[0], groups, seed=3).add(8).round() if zeros else None
    operands = (weight, scale, zero, randn(sizes[1], seed=4).square(), torch.linspace(1, 0.4, 7))
    found = shrink_losses(*operands, group=group, middle=8.0, largest=15.0)
    expected = shrink_losses_reference(*operands, group=group, middle=8.0, largest=15.0)
    # A number halfway between two loses the same either way.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    have = fit_sums(*operands[:4], group=group, middle=8.0, largest=15.0)
    want = fit_sums_reference(*operands[:4], group=group, middle=8.0, largest=15.0)
    for one, other in zip(have, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(1, 1), (5, 70), (32, 200), (7, 3000), (3, 0)])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
def test_columns(native: None, sizes: tuple[int, int], zeros: bool, aligned: bool) -> None:
    columns, out = sizes
    weight, root = randn(columns, out), randn(columns, columns, seed=1).triu() / 4
    root.diagonal().abs_().add_(1)
    handed = randn(columns, columns, seed=2).triu(1) / 10 if aligned else None
    scale = randn(3, out, seed=3).abs() / 8 + 0.05
    zero = randn(3, out, seed=4).add(8).round() if zeros else None
    steps = ColumnSteps(scale_GO=scale, inverse_GO=1 / scale, zero_GO=zero, middle=8.0, largest=15.0)
    groups = [column % 3 for column in range(columns)]
    results = []
    for function in (round_columns, round_columns_reference):
        own, numbers = weight.clone(), torch.empty_like(weight)
        results.append((own, numbers, function(own, numbers, steps, groups, root, handed)))
    (own, numbers, lost), (own_twin, numbers_twin, lost_twin) = results
    # Sums in another order: where a weight lies on the border of two numbers, its row goes another way from there.
    same = (numbers == numbers_twin).all(0)
    assert same.double().mean() > 0.99 or not out
    for have, want in ((own, own_twin), (lost, lost_twin)):
        torch.testing.assert_close(have[:, same], want[:, same], rtol=1e-4, atol=1e-4)
