"""Products with a low-rank update: the kernels beside their twins, and beside the map they stand for in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from oarsmith.kernels import low_rank
from oarsmith.kernels.int8 import Int8Weight, quantize_weight, rotate, rotation_size
from oarsmith.kernels.low_rank import (
    low_rank_backward,
    low_rank_backward_reference,
    low_rank_forward,
    low_rank_forward_reference,
    thin_product,
)
from oarsmith.kernels.select import library, using

from .conftest import randn

# Tokens, inputs, outputs, rank: single numbers, nothing a multiple of a tile, several blocks, more rank than a tile.
SIZES = [(1, 1, 1, 1), (33, 70, 90, 20), (31, 8, 65, 256), (300, 576, 136, 48), (700, 96, 1000, 16)]


@pytest.fixture(autouse=True)
def _tiles(native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = library()
    if found is None or not found.has_tile_products:
        pytest.skip("this CPU has no AMX")
    monkeypatch.setattr(low_rank, "_MIN_ROWS", 1)


def half(*shape: int, seed: int) -> Tensor:
    return randn(*shape, seed=seed).bfloat16()


def close(found: Tensor, expected: Tensor, tolerance: float = 2**-7) -> None:
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape
    scale = float(expected.float().abs().max())
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_dense(sizes: tuple[int, int, int, int], with_bias: bool) -> None:
    tokens, inputs, outputs, rank = sizes
    x, w, dy = half(tokens, inputs, seed=0), half(outputs, inputs, seed=1), half(tokens, outputs, seed=2)
    a, b = half(rank, inputs, seed=3), half(outputs, rank, seed=4)
    bias = half(outputs, seed=5) if with_bias else None
    y, xa = low_rank_forward(x, w, bias, a, b)
    dx, dxa = low_rank_backward(dy, w, a, b)
    wide = None if bias is None else bias.float()
    expected, expected_xa = low_rank_forward_reference(x.float(), w.float(), wide, a.float(), b.float())
    close(y, expected)
    close(xa, expected_xa)
    expected, expected_dxa = low_rank_backward_reference(dy.float(), w.float(), a.float(), b.float())
    close(dx, expected)
    close(dxa, expected_dxa)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_int8(sizes: tuple[int, int, int, int], with_bias: bool) -> None:
    tokens, inputs, outputs, rank = sizes
    x, dy = half(tokens, inputs, seed=0), half(tokens, outputs, seed=2)
    w, bias = quantize_weight(half(outputs, inputs, seed=1)), half(outputs, seed=5) if with_bias else None
    a, b = half(rank, inputs, seed=3), half(outputs, rank, seed=4)
    found = (*low_rank_forward(x, w, bias, a, b), *low_rank_backward(dy, w, a, b))
    with using("torch"):
        twin = low_rank_forward_reference(x, w, bias, a, b)
        twin_back = low_rank_backward_reference(dy, w, a, b)
    # A number of x that lies between two of 8 bits may become the other one.
    for have, want in zip(found, (*twin, *twin_back), strict=True):
        close(have, want, 2**-6)


def test_what_is_not_finite_stays(sizes: tuple[int, int, int, int] = (40, 64, 96, 16)) -> None:
    tokens, inputs, outputs, rank = sizes
    x, w = half(tokens, inputs, seed=0), half(outputs, inputs, seed=1)
    a, b = half(rank, inputs, seed=3), half(outputs, rank, seed=4)
    x[7, 3] = torch.inf
    for weight in (w, quantize_weight(w)):
        y, _ = low_rank_forward(x, weight, None, a, b)
        finite = torch.arange(tokens) != 7
        assert y[finite].isfinite().all() and not y[7].isfinite().any()


def test_a_rotated_update_is_the_update() -> None:
    """Backward's output is rotated after the update has joined the sums."""
    w = Int8Weight(torch.zeros(64, 96, dtype=torch.int8), torch.zeros(64))
    dy, a, b = half(50, 64, seed=0), half(16, 96, seed=1), half(64, 16, seed=2)
    assert rotation_size(96) == 32 and not torch.equal(rotate(a.float(), 32), a.float())
    dx, dxa = low_rank_backward(dy, w, a, b)
    close(dx, dxa.float() @ a.float())


@pytest.mark.parametrize("sizes", [(1, 1, 1), (33, 17, 70), (1100, 40, 200), (600, 256, 65)])
def test_thin_product(sizes: tuple[int, int, int]) -> None:
    rows, rank, columns = sizes
    a, x = half(rows, rank, seed=0), half(rows, columns, seed=1)
    close(thin_product(a, x), a.float().t() @ x.float(), 2**-8)


def test_the_number_of_threads_changes_nothing() -> None:
    x, w, a, b = half(200, 96, seed=0), half(130, 96, seed=1), half(16, 96, seed=2), half(130, 16, seed=3)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append((*low_rank_forward(x, w, None, a, b), thin_product(a.t().contiguous()[:, :3], x[:96])))
    torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_few_rows_and_other_types_take_the_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "_run", None)
    monkeypatch.setattr(low_rank, "_MIN_ROWS", 9)
    for dtype, rows in ((torch.bfloat16, 8), (torch.float32, 9)):
        x, w, a, b = (randn(*shape).to(dtype) for shape in ((rows, 12), (10, 12), (3, 12), (10, 3)))
        y, xa = low_rank_forward(x, w, None, a, b)
        assert y.shape == (rows, 10) and xa.shape == (rows, 3)
        assert low_rank_backward(y, w, a, b)[0].shape == x.shape
