"""MoRA beside its definition, chunk by chunk in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from oarsmith.adapters.change import Sitting, Size
from oarsmith.adapters.mora import Mora, mora_side
from oarsmith.errors import ConfigError

from .beside_peft import formula_close

# Chunks that fit, one that is filled up from the input's beginning, an output that is cut off, and one repeated.
SIZES = [Size(24, 24), Size(10, 64), Size(64, 10), Size(7, 33), Size(90, 21)]


def by_definition(matrix: Tensor, x: Tensor, size: Size) -> Tensor:
    side = len(matrix)
    chunks = math.ceil(size.in_features / side)
    filled = torch.cat([x, x])[: chunks * side]
    pieces = []
    for place in range(chunks):
        piece = filled[place * side : (place + 1) * side]
        turned = torch.empty_like(piece)
        for i in range(side // 2):
            angle = place * 10000 ** (-2 * i / side)
            turned[i] = piece[i] * math.cos(angle) - piece[i + side // 2] * math.sin(angle)
            turned[i + side // 2] = piece[i + side // 2] * math.cos(angle) + piece[i] * math.sin(angle)
        pieces.append(matrix @ turned)
    row = torch.cat(pieces)
    return row.repeat(math.ceil(size.out_features / len(row)))[: size.out_features]


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("size", SIZES)
def test_the_formula(size: Size, rank: int) -> None:
    change, generator = Mora(rank=rank), torch.Generator().manual_seed(1)
    (side, _) = change.shapes(size)["matrix"]
    matrix = torch.randn(side, side, generator=generator).requires_grad_()
    x = torch.randn(5, size.in_features, generator=generator).requires_grad_()
    on = Sitting(size, {"matrix": matrix})
    found = change.added(on, x, training=False)
    wide, rows = matrix.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    expected = torch.stack([by_definition(wide, row, size) for row in rows])
    formula_close(found, expected)
    dout = torch.randn(found.shape, generator=generator)
    for ours, theirs in zip(
        torch.autograd.grad(found, [matrix, x], dout),
        torch.autograd.grad(expected, [wide, rows], dout.double()),
        strict=True,
    ):
        formula_close(ours, theirs)
    weight = torch.randn(size.out_features, size.in_features, generator=generator)
    merged = change.merged(on, weight).detach()
    torch.testing.assert_close(x.detach() @ (merged - weight).t(), found.detach(), rtol=1e-4, atol=1e-4)


def test_by_hand() -> None:
    """Width 8, rank 1 to 8: a side of 4, so two chunks, of which the second is turned by 1 and by a hundredth."""
    size = Size(8, 8)
    assert mora_side(size, 1) == 4
    x = torch.arange(1.0, 9.0)
    found = Mora(rank=1).added(Sitting(size, {"matrix": torch.eye(4)}), x[None], training=False)[0]
    c, s, c2, s2 = math.cos(1), math.sin(1), math.cos(0.01), math.sin(0.01)
    turned = [5 * c - 7 * s, 6 * c2 - 8 * s2, 7 * c + 5 * s, 8 * c2 + 6 * s2]
    torch.testing.assert_close(found, torch.tensor([1.0, 2.0, 3.0, 4.0, *turned]))


def test_parameters_are_those_of_lora() -> None:
    for width, rank in ((2048, 8), (576, 16), (4096, 64)):
        side = mora_side(Size(width, width), rank)
        assert side % 2 == 0 and side**2 == pytest.approx(2 * width * rank, rel=0.05)


def test_a_rank_that_is_too_high() -> None:
    with pytest.raises(ConfigError, match="a matrix of side 28 on a projection of 9 features"):
        Mora(rank=40).shapes(Size(11, 9))
