"""PoSE against its definition: chunks, skips, and what stays as it was."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from oarsmith.data.batch import make_batch
from oarsmith.data.pose import Pose
from tiny import random_samples

LENGTHS = (40, 1, 2, 64, 100, 7)


def skips(batch, posed) -> list[list[int]]:
    """How far each token of each document is moved on."""
    moved = (posed.positions - batch.positions).tolist()
    return [moved[a:b] for a, b in pairwise(batch.bounds)]


@pytest.mark.parametrize("num_chunks", [2, 3, 5])
def test_definition(num_chunks: int) -> None:
    batch = make_batch(random_samples(LENGTHS))
    for index in range(50):
        posed = Pose(num_positions=100, num_chunks=num_chunks, seed=3).apply(batch, epoch=1, index=index)
        for moved in skips(batch, posed):
            assert moved[0] == 0 and moved == sorted(moved), "the first chunk stays, the others move on"
            assert len(set(moved)) <= num_chunks
            assert len(moved) + moved[-1] <= 100, "no position lies outside the stretched context"
        for name in ("input_ids", "targets", "weights"):
            assert torch.equal(getattr(posed, name), getattr(batch, name))
        assert posed.bounds == batch.bounds and posed.where == batch.where


def test_cuts_and_skips_are_uniform() -> None:
    """Two chunks of 11 tokens over 31 positions: 10 cuts and 21 skips, each as often as the others."""
    batch, cuts, lasts = make_batch(random_samples([11] * 40)), [], []
    for index in range(500):
        posed = Pose(num_positions=31).apply(batch, epoch=0, index=index)
        for moved in skips(batch, posed):
            lasts.append(moved[-1])
            if moved[-1]:
                cuts.append(int(np.argmax(np.asarray(moved) > 0)))
    assert set(cuts) == set(range(1, 11)) and set(lasts) == set(range(21))
    for found in (cuts, lasts):
        counts = np.bincount(found)[min(found) :]
        expected = len(found) / len(counts)
        # Pearson's statistic of 20,000 draws: its mean is the number of classes, its 99.99th percentile 53 for 21.
        assert ((counts - expected) ** 2 / expected).sum() < 53


def test_second_skips_lie_beyond_the_first() -> None:
    """u_2 is uniform from u_1 on: its mean is half of the way from u_1 to the end."""
    batch, ends = make_batch(random_samples([200])), []
    for index in range(2000):
        (moved,) = skips(batch, Pose(num_positions=1200, num_chunks=3).apply(batch, epoch=0, index=index))
        ends.append(moved[-1])
    # 1000 * (1/2 + 1/4) = 750 with a deviation of 220 a draw: 2,000 draws are within 20 but for one in 10,000.
    assert np.mean(ends) == pytest.approx(750, abs=20)


def test_key() -> None:
    batch = make_batch(random_samples(LENGTHS))

    def positions(seed: int = 1, epoch: int = 0, index: int = 0) -> list[int]:
        return Pose(num_positions=1000, seed=seed).apply(batch, epoch=epoch, index=index).positions.tolist()

    assert positions() == positions()
    others = [positions(seed=2), positions(epoch=1), positions(index=1), positions(seed=-1)]
    assert all(other != positions() for other in others)


def test_pinned() -> None:
    """Draws that a later version must repeat, or a resumed run would not be the uninterrupted one."""
    batch = make_batch(random_samples([4, 6]))
    posed = Pose(num_positions=1000, num_chunks=3, seed=7).apply(batch, epoch=2, index=5)
    assert posed.positions.tolist() == [0, 1, 874, 884, 0, 1, 2, 3, 613, 846]


def test_a_document_longer_than_the_context_keeps_its_positions() -> None:
    batch = make_batch(random_samples([40, 50]))
    posed = Pose(num_positions=40).apply(batch, epoch=0, index=0)
    assert torch.equal(posed.positions, batch.positions)
