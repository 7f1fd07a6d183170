"""Batches under PoSE from any place of a loader, and what the decoder makes of them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from oarsmith.data.loader import Loader
from oarsmith.data.pose import Pose
from oarsmith.errors import ConfigError
from oarsmith.losses.token import token_cross_entropy
from oarsmith.models.stretch import stretch
from oarsmith.training.pose import PosedBatches
from tiny import CONFIGS, random_samples, tiny_decoder


def plain_source() -> Loader:
    return Loader(random_samples([30, 12, 25, 9, 31, 17]), rows_per_batch=2, capacity=40, packing=True, seed=5)


def source() -> PosedBatches:
    return PosedBatches(plain_source(), Pose(num_positions=500, seed=5))


def test_the_same_from_any_place() -> None:
    """Two epochs in one go, and resumed before every batch."""
    whole, states, found = source(), [], []
    for _ in range(2):
        batches = iter(whole)
        while True:
            states.append(whole.state())
            batch = next(batches, None)
            if batch is None:
                states.pop()
                break
            found.append(batch)
    assert len(found) == whole.batches_per_epoch(0) + whole.batches_per_epoch(1)
    for state, expected in zip(states, found, strict=True):
        resumed = source()
        resumed.load_state(state)
        batch = next(iter(resumed))
        assert torch.equal(batch.positions, expected.positions) and torch.equal(batch.input_ids, expected.input_ids)
    assert any(int(batch.positions.max()) > 40 for batch in found)


def test_another_context_is_refused() -> None:
    for other in (PosedBatches(plain_source(), Pose(num_positions=400)), plain_source()):
        with pytest.raises(ConfigError, match="skip within 500"):
            source().load_state(other.state())


@pytest.mark.parametrize("kind", ["linear", "ntk", "dynamic", "yarn"])
def test_loss_is_that_of_the_positions(kind: str, few_threads: None) -> None:
    """Each document alone with its positions gives the loss it has in the batch."""
    config = stretch({**CONFIGS["llama"], "max_position_embeddings": 64}, kind, 8.0)
    model, batch = tiny_decoder(**config), next(iter(source()))
    total = 0.0
    for start, stop in pairwise(batch.bounds):
        rows = (x[None, start:stop] for x in (batch.input_ids, batch.positions))
        log_p = model(*rows)[0].detach().log_softmax(-1).gather(1, batch.targets[start:stop, None])[:, 0]
        total -= float((log_p * batch.weights[start:stop]).sum())
    assert token_cross_entropy(model, batch, 1.0).total == pytest.approx(total, rel=1e-5)
    plain = next(iter(PosedBatches(plain_source(), Pose(num_positions=31))))
    assert token_cross_entropy(model, plain, 1.0).total != pytest.approx(total, rel=1e-5)
