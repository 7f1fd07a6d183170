"""Rotations: orthogonal, the same as their matrix, and good at what they are for."""

from __future__ import annotations

import pytest
import torch

from oarsmith.errors import ModelError
from oarsmith.quantize.rotate import hadamard, random_orthogonal, random_rotation


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 12, 64, 96, 576])
def test_orthogonal_and_as_its_matrix(size: int) -> None:
    rotation = random_rotation(size, seed=3)
    matrix = rotation.matrix()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    x = torch.randn(4, 5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation.apply(x), x @ matrix)
    torch.testing.assert_close(rotation.undo(x), x @ matrix.T)
    torch.testing.assert_close(rotation.undo(rotation.apply(x.float())), x.float(), rtol=1e-4, atol=1e-5)
    assert rotation.apply(x.bfloat16()).dtype is torch.bfloat16


def test_hadamard_is_sylvesters() -> None:
    expected = torch.ones(1, 1)
    for _ in range(4):
        expected = torch.cat([torch.cat([expected, expected], 1), torch.cat([expected, -expected], 1)])
    torch.testing.assert_close(hadamard(torch.eye(16)), expected / 4)


def test_by_its_parts() -> None:
    rotation = random_rotation(24, seed=5)
    assert rotation.mix_RR.shape == (3, 3) and rotation.size == 24
    expected = torch.kron(hadamard(torch.eye(8, dtype=torch.float64)), rotation.mix_RR)
    torch.testing.assert_close(rotation.matrix(), rotation.signs_D[:, None] * expected)


def test_the_seed_decides() -> None:
    assert torch.equal(random_rotation(24, 1).matrix(), random_rotation(24, 1).matrix())
    assert not torch.equal(random_rotation(24, 1).matrix(), random_rotation(24, 2).matrix())
    first = random_orthogonal(3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(first.det().abs(), torch.tensor(1.0, dtype=torch.float64))


def test_an_outlier_is_spread() -> None:
    x = torch.zeros(576)
    x[100] = 1.0
    # Spread evenly it would be 1 / 24 everywhere.
    assert random_rotation(576).apply(x).abs().max() < 3.5 / 24


def test_what_is_refused() -> None:
    with pytest.raises(ModelError, match="12 is no power of two"):
        hadamard(torch.ones(3, 12))
    with pytest.raises(ModelError, match="nothing of size 0"):
        random_rotation(0)
