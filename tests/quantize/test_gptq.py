"""GPTQ beside the method as the papers write it: float64, one column at a time, the Hessian inverted each time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from oarsmith.errors import ConfigError, DataError, ModelError
from oarsmith.quantize.gptq import GPTQ, Hessian, gptq, relative_error
from oarsmith.quantize.grid import Grid, Steps, decode, encode, quantize, range_steps
from oarsmith.quantize.search import Search, search_steps

GRIDS = {
    "asymmetric": Grid(group=16),
    "symmetric": Grid(group=16, symmetric=True),
    "row": Grid(group=None, bits=3),
    "int8": Grid(group=None, bits=8, symmetric=True),
    "e4m3": Grid(code="e4m3", bits=8, group=None),
    "not dividing": Grid(group=20),
}


def inputs(tokens: int = 300, width: int = 48, seed: int = 0) -> Tensor:
    """Rows whose columns differ in size and hang together."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return mixed * torch.rand(width, generator=generator).mul(3).exp() / 10


def weights(out: int = 12, width: int = 48, seed: int = 1) -> Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) / 10


def seen(x_TI: Tensor, full_TI: Tensor | None = None) -> Hessian:
    hessian = Hessian(x_TI.shape[1], cross=full_TI is not None)
    hessian.add(x_TI, full_TI)
    return hessian


def naive(
    weight_OI: Tensor,
    x_TI: Tensor,
    grid: Grid,
    steps: Steps,
    order: list[int],
    full_TI: Tensor | None = None,
    damping: float = 0.01,
    alpha: float = 0.25,
) -> Tensor:
    """Optimal Brain Quantization in a fixed order (GPTQ's equations 2 and 3; GPTAQ's term of what a column owes)."""
    w, x = weight_OI.double().clone(), x_TI.double()
    hessian = x.T @ x / len(x)
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    cross = None if full_TI is None else (full_TI.double() - x).T @ x / len(x)
    scale, zero = steps.columns(0, w.shape[1], grid.group_of(w.shape[1]))
    result, left = torch.empty_like(w), list(order)
    for column in order:
        one = slice(column, column + 1)
        zero_O = None if zero is None else zero[:, one]
        near = decode(encode(w[:, one].float(), scale[:, one], zero_O, grid), scale[:, one], zero_O, grid)[
            :, 0
        ].double()
        result[:, column] = near
        inverse = hessian[left][:, left].inverse()
        before, lost = w[:, column].clone(), w[:, column] - near
        w[:, left] -= torch.outer(lost / inverse[0, 0], inverse[0])
        left = left[1:]
        if cross is not None and left:
            rest = hessian[left][:, left].inverse()
            w[:, left] += alpha * torch.outer(before, cross[column, left] @ rest)
    return result


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("order", ["none", "columns", "groups"])
@pytest.mark.parametrize("aligned", [False, True], ids=["gptq", "gptaq"])
def test_the_papers_method(grid: Grid, order: Any, aligned: bool) -> None:
    x, weight = inputs(), weights()
    full = x + 0.2 * inputs(seed=5) if aligned else None
    found = gptq(weight, seen(x, full), grid, GPTQ(order=order, search=None))
    size = x.square().mean(0)
    columns = list(range(48))
    if order == "columns":
        columns.sort(key=lambda column: -float(size[column]))
    if order == "groups":
        group = grid.group_of(48)
        largest = {g: float(size[g * group : (g + 1) * group].max()) for g in range(grid.num_groups(48))}
        columns.sort(key=lambda column: (-largest[column // group], -float(size[column])))
    expected = naive(weight, x, grid, range_steps(weight, grid), columns, full)
    got = found.quantized.dense().double()
    # fp32 beside float64: now and then a weight lies on the border of two numbers, and what follows in its row differs.
    same = torch.isclose(got, expected, atol=1e-5).all(1)
    assert same.double().mean() >= 0.75, same
    lost, whole = ((weight - got) @ x.double().T).square().sum(), (weight.double() @ x.double().T).square().sum()
    assert found.error == pytest.approx(float(lost / whole), rel=1e-3)


def test_less_is_lost_than_by_rounding_to_nearest() -> None:
    x, weight = inputs(), weights(64)
    matrix = seen(x).matrix_II
    grid = Grid(group=16)
    nearest = relative_error(weight, quantize(weight, grid).dense(), matrix)
    plain = gptq(weight, seen(x), grid, GPTQ(search=None)).error
    searched = gptq(weight, seen(x), grid).error
    assert plain < 0.7 * nearest
    assert searched < 0.7 * nearest


def test_the_target_of_the_model_in_floats() -> None:
    full, weight = inputs(2000), weights(64)
    x = full + 0.1 * full.abs().mean() * torch.randn(full.shape, generator=torch.Generator().manual_seed(3))
    x = x @ (torch.eye(48) + 0.02 * torch.randn(48, 48, generator=torch.Generator().manual_seed(4)))
    target = full @ weight.T

    def lost(aligned: bool) -> float:
        found = gptq(weight, seen(x, full if aligned else None), Grid(group=16), GPTQ(alpha=1.0))
        return float((x @ found.quantized.dense().T - target).square().sum())

    assert lost(True) < 0.8 * lost(False)


def test_batches_are_one_mean() -> None:
    x = inputs(301, 600)
    hessian = Hessian(600, cross=True)
    for part in x.split(64):
        hessian.add(part, part * 2)
    hessian.add(x[:0], x[:0])
    expected = x.double().T @ x.double() / 301
    torch.testing.assert_close(hessian.matrix_II.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    assert hessian.cross_II is not None
    torch.testing.assert_close(hessian.cross_II.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    assert torch.equal(hessian.matrix_II, hessian.matrix_II.T)


def test_steps_at_a_groups_turn() -> None:
    x, weight, grid = inputs(), weights(), Grid(group=16)
    found = gptq(weight, seen(x), grid, GPTQ(order="none", static=False, search=None)).quantized
    # The first group's are those of the weights as they were; the others' are of what they were turned into.
    before = range_steps(weight, grid)
    assert torch.equal(found.steps.scale_OG[:, 0], before.scale_OG[:, 0])
    assert not torch.equal(found.steps.scale_OG[:, 1], before.scale_OG[:, 1])
    ordered = gptq(weight, seen(x), Grid(group=20), GPTQ(order="groups", static=False))
    assert ordered.error < relative_error(weight, quantize(weight, Grid(group=20)).dense(), seen(x).matrix_II)
    with pytest.raises(ConfigError, match="order groups"):
        gptq(weight, seen(x), grid, GPTQ(order="columns", static=False))


def test_columns_without_input_are_rounded_to_nearest() -> None:
    x, weight, grid = inputs(), weights(), Grid(group=16)
    x[:, [3, 40]] = 0
    found = gptq(weight, seen(x), grid, GPTQ(search=None)).quantized
    nearest = quantize(weight, grid)
    assert torch.equal(found.numbers_OI[:, [3, 40]], nearest.numbers_OI[:, [3, 40]])


@pytest.mark.parametrize("width", [1, 5])
def test_degenerate_maps(width: int) -> None:
    x, weight = inputs(width=width), weights(3, width)
    weight[1] = 0
    found = gptq(weight, seen(x), Grid(group=4), GPTQ(order="groups"))
    assert torch.equal(found.quantized.dense()[1], torch.zeros(width))
    assert found.error < 0.05
    silent = gptq(weight, seen(torch.zeros(8, width)), Grid(group=4))
    assert silent.error == 0
    assert (silent.quantized.dense() - weight).abs().max() < 0.05


def test_fewer_tokens_than_columns(caplog: pytest.LogCaptureFixture) -> None:
    x, weight = inputs(5), weights()
    assert gptq(weight, seen(x), Grid(group=16)).damping == 0.01
    found = gptq(weight, seen(x), Grid(group=16), GPTQ(damping=0.0), "model.layers.0.o_proj")
    assert found.damping > 0
    assert "model.layers.0.o_proj: its Hessian is not positive with damping 0" in caplog.text


def test_what_is_refused() -> None:
    x, weight = inputs(), weights()
    x[4, 3] = torch.nan
    with pytest.raises(ModelError, match=r"a batch of inputs: 1 of 14400 numbers are NaN(.|\n)*bfloat16"):
        seen(x)
    with pytest.raises(DataError, match="no token has gone through"):
        gptq(weight, Hessian(48), Grid(group=16))
    weight[0, 0] = torch.inf
    with pytest.raises(ModelError, match="o_proj: a weight: 1"):
        gptq(weight, seen(inputs()), Grid(group=16), where="o_proj")
    with pytest.raises(ModelError, match="no matrix"):
        gptq(weight[None], seen(inputs()), Grid(group=16))


def test_searched_steps_are_the_searchs() -> None:
    x, weight, grid = inputs(), weights(), Grid(group=16)
    found = gptq(weight, seen(x), grid, GPTQ(search=Search(points=7))).quantized
    expected = search_steps(weight, grid, seen(x).matrix_II.diagonal(), Search(points=7))
    assert torch.equal(found.steps.scale_OG, expected.scale_OG)
