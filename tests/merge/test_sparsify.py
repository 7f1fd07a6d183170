"""Which numbers are kept: against sorting, and by their distribution."""

import numpy as np
import pytest
import torch

from oarsmith.errors import ModelError
from oarsmith.merge.job import blocks
from oarsmith.merge.sparsify import Breadcrumbs, Delta, Drop, Magnitude, MagnitudeDrop, cuts, keeper


def delta_of(values, *, row=None, key=1, sixteen_bit=False):
    flat = values.reshape(-1)
    return Delta(lambda part: flat[part].clone(), flat.numel(), row or flat.numel(), sixteen_bit, key, "w")


def kept(rule, values, **keys):
    delta = delta_of(values, **keys)
    keep = keeper(rule, delta)()
    row = delta.row if rule.by_rows else 1
    return torch.cat([keep(part, delta.values(part)) for part in blocks(delta.numel, row)])


@pytest.mark.parametrize("size", [1, 2, 7, 1000, 300_001])
@pytest.mark.parametrize("coarse", [False, True])
def test_the_largest(size, coarse):
    values = torch.randn(size, generator=torch.Generator().manual_seed(size))
    values = (values * 4).round() / 4 if coarse else values
    for share in (0.01, 0.3, 0.5, 0.99, 1.0):
        count = max(int(share * size), 1)
        found = kept(Magnitude(share), values)
        magnitudes = values.abs()
        expected = torch.argsort(magnitudes, descending=True, stable=True)[:count]  # of equal ones the first
        wanted = torch.zeros_like(values)
        wanted[expected] = values[expected]
        assert torch.equal(found, wanted)


def test_cuts_in_the_middle():
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    order = values.abs().sort(descending=True).values
    for cut, count in zip(cuts(delta_of(values), [1, 77, 5000]), (1, 77, 5000), strict=True):
        number = torch.tensor(cut.bits, dtype=torch.int32).view(torch.float32)
        assert float(number) == float(order[count - 1])
        assert cut.equal == 1 == cut.present


def test_breadcrumbs():
    values = torch.arange(1.0, 101) * torch.tensor([1.0, -1.0]).repeat(50)
    found = kept(Breadcrumbs(0.5, 0.1), values)
    assert torch.equal(found.nonzero().squeeze(1), torch.arange(40, 90))


def test_breadcrumbs_of_few_numbers():
    values = torch.arange(1.0, 9)
    assert int(kept(Breadcrumbs(0.5, 0.01), values).count_nonzero()) == 4
    assert int(kept(Breadcrumbs(0.5, 0.01, drop_without_outliers=True), values).count_nonzero()) == 0


def test_quantiles_as_paddlenlp():
    values = torch.randn(1001, generator=torch.Generator().manual_seed(3))
    for share in (0.2, 0.7):
        limit = torch.quantile(values.abs().double(), 1 - share)
        assert torch.equal(kept(Magnitude(share, trim_by="quantile"), values), values * (values.abs() >= limit))


def test_l1_is_kept():
    values = torch.randn(999, generator=torch.Generator().manual_seed(3))
    for rule in (Magnitude(0.3, "l1"), Drop(0.3, "l1"), MagnitudeDrop(0.5, 0.2, "l1")):
        found = kept(rule, values)
        assert float(found.abs().sum()) == pytest.approx(float(values.abs().sum()), rel=1e-5)


def test_random_drop():
    values = torch.ones(200_000)
    found = kept(Drop(0.3, "density"), values)
    share = float((found != 0).double().mean())
    assert abs(share - 0.3) < 5 * (0.3 * 0.7 / len(values)) ** 0.5  # five standard deviations
    assert torch.equal(found[found != 0].unique(), torch.tensor([1 / 0.3]))
    assert torch.equal(found, kept(Drop(0.3, "density"), values))
    assert not torch.equal(found, kept(Drop(0.3, "density"), values, key=2))


@pytest.mark.parametrize("sixteen_bit", [False, True])
def test_probability_grows_with_rank_in_a_row(sixteen_bit):
    columns, rows = 20, 20_000
    # Magnitudes that 16 bits tell apart, in another order in each row.
    order = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)).argsort(1)
    values = (1.5 ** order.float()) * torch.where(order % 2 == 0, 1.0, -1.0)
    found = kept(MagnitudeDrop(0.5, 0.6, "none"), values, row=columns, sixteen_bit=sixteen_bit).view(rows, columns)
    share = torch.zeros(columns).scatter_add_(0, order.reshape(-1), (found != 0).float().reshape(-1)) / rows
    expected = torch.linspace(0.2, 0.8, columns)
    assert float((share - expected).abs().max()) < 5 * 0.5 / rows**0.5


def test_probability_by_rank_in_the_tensor():
    size, tries = 64, 4000
    values = 1.5 ** torch.arange(size).float()
    count = torch.zeros(size)
    for key in range(tries):
        found = kept(MagnitudeDrop(0.6, 0.4, "density", "tensor"), values, key=key)
        count += found != 0
    # PaddleNLP: dropped with (1 - p) - e / 2 + e * rank / n, rank 0 the largest.
    rank = torch.arange(size - 1, -1, -1)
    expected = 1 - (0.4 - 0.2 + 0.4 * rank / size)
    assert float((count / tries - expected).abs().max()) < 5 * 0.5 / tries**0.5
    mean = np.mean([float(kept(MagnitudeDrop(0.6, 0.4, "density", "tensor"), values, key=k).sum()) for k in range(300)])
    assert mean == pytest.approx(float(values.sum()), rel=0.15)


def test_probabilities_stay_probabilities():
    with pytest.raises(ModelError, match="leave"):
        kept(MagnitudeDrop(0.95, 0.2), torch.ones(4))
