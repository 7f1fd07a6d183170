"""Smoothing: the layer stays the function that it is, and int8 loses less of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from oarsmith.errors import DataError, ModelError
from oarsmith.quantize.smooth import Extremes, Piecewise, pieces_of, piecewise_factors, smooth_factors


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = torch.ones(48)
    size[[3, 17]] = 60.0
    size[20:30] = 6.0
    return torch.randn(200, 48, generator=generator) * size


def weights(out: int = 24, seed: int = 1) -> Tensor:
    return torch.randn(out, 48, generator=torch.Generator().manual_seed(seed)) / 10


def int8(x: Tensor, dim: int | None) -> Tensor:
    most = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    return (x / most * 127).round() * most / 127


def lost(x: Tensor, weight: Tensor, factor: Tensor) -> float:
    out = int8(x / factor, None) @ int8(weight * factor, 1).T
    return float((out - x @ weight.T).square().sum() / (x @ weight.T).square().sum())


def test_factors_by_hand() -> None:
    # sqrt(16) / sqrt(4), sqrt(1) / sqrt(.25); the second map has the larger second column.
    most, maps = torch.tensor([16.0, 1.0]), [torch.tensor([[4.0, 0.1]]), torch.tensor([[-1.0, -0.25]])]
    assert smooth_factors(most, maps).tolist() == pytest.approx([2.0, 2.0])
    assert smooth_factors(most, maps, 1.0).tolist() == pytest.approx([16.0, 1.0])
    assert smooth_factors(most, maps, 0.0).tolist() == pytest.approx([0.25, 4.0])


def test_the_layer_stays_what_it_is() -> None:
    x, weight = inputs().double(), weights().double()
    factor = smooth_factors(x.abs().amax(0), [weight]).double()
    torch.testing.assert_close((x / factor) @ (weight * factor).T, x @ weight.T)
    assert lost(x, weight, factor) < 0.2 * lost(x, weight, torch.ones(48))


def test_silent_channels_keep_a_factor_of_one() -> None:
    factor = smooth_factors(torch.tensor([0.0, 2.0, 1e-30]), [torch.tensor([[1.0, 0.0, 1.0]])])
    assert factor[:2].tolist() == [1.0, 1.0]
    assert torch.isfinite(factor).all() and (factor > 0).all()


def test_extremes_of_all_batches() -> None:
    x = inputs() + 5
    seen = Extremes()
    for part in x.split(64):
        seen.add(part)
    seen.add(x[:0])
    assert torch.equal(seen.most_I, x.abs().amax(0))
    torch.testing.assert_close(seen.shift_I, (x.amax(0) + x.amin(0)) / 2)
    moved = x - seen.shift_I
    torch.testing.assert_close(moved.amax(0), -moved.amin(0), rtol=1e-4, atol=1e-4)


def test_extremes_as_a_running_mean() -> None:
    seen = Extremes(ema=True)
    seen.add(torch.tensor([[1.0], [3.0]]))
    assert float(seen.shift_I) == pytest.approx(2.0)
    seen.add(torch.tensor([[5.0], [9.0]]))
    # (.98 * .02 * 2 + .02 * 7) / (1 - .98^2)
    assert float(seen.shift_I) == pytest.approx((0.98 * 0.02 * 2 + 0.02 * 7) / (1 - 0.98**2), rel=1e-4)
    assert float(seen.most_I) == 9.0


def test_pieces() -> None:
    size = torch.tensor([1.0, 50.0, 2.0, 51.0, 9.0, 1.5, 10.0])
    assert pieces_of(size, 3).tolist() == [0, 2, 0, 2, 1, 0, 1]
    assert pieces_of(size, 1).tolist() == [0] * 7
    assert pieces_of(torch.ones(4), 3).tolist() == [0] * 4


def test_piecewise_search_is_never_worse_than_one_exponent() -> None:
    x, weight = inputs(), weights()
    most, ones = x.abs().amax(0), torch.ones(48)
    plain = min(lost(x, weight, smooth_factors(most, [weight], 0.2 + 0.05 * n)) for n in range(13))
    one = piecewise_factors(x, most, [weight], Piecewise(pieces=1))
    assert lost(x, weight, one) == pytest.approx(plain, rel=1e-4)
    several = piecewise_factors(x, most, [weight[:10], weight[10:]], Piecewise(pieces=6, search_pieces=True))
    assert lost(x, weight, several) <= lost(x, weight, one) * (1 + 1e-6)
    assert lost(x, weight, several) < 0.2 * lost(x, weight, ones)
    three = piecewise_factors(x, most, [weight])
    assert lost(x, weight, three) < 0.2 * lost(x, weight, ones)


def test_factors_of_tied_channels() -> None:
    x, weight = inputs(), weights()

    def pairs(factor_I: Tensor) -> Tensor:
        return factor_I.unflatten(0, (-1, 2)).amax(1).repeat_interleave(2)

    found = piecewise_factors(x, x.abs().amax(0), [weight], tie=pairs)
    assert torch.equal(found[::2], found[1::2])
    assert lost(x, weight, found) <= lost(x, weight, torch.ones(48))


def test_what_is_refused() -> None:
    with pytest.raises(ModelError, match="the largest inputs: 1 of 48"):
        smooth_factors(torch.ones(48).index_fill_(0, torch.tensor([4]), torch.inf), [weights()])
    with pytest.raises(ModelError, match="a batch of inputs"):
        Extremes().add(torch.full((2, 3), torch.nan))
    with pytest.raises(DataError, match="no token"):
        _ = Extremes().shift_I
