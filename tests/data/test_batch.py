"""Token-major batches against a plain loop over documents."""

from __future__ import annotations

import numpy as np
import torch

from oarsmith.data.batch import make_batch
from oarsmith.data.samples import Sample


def sample(ids, weights, where="rows:1"):
    return Sample(np.asarray(ids, dtype=np.int32), np.asarray(weights, dtype=np.float32), where)


def test_targets_and_weights_are_the_next_tokens_within_each_document():
    rng = np.random.default_rng(0)
    documents = []
    for length in (1, 5, 2, 17, 1, 3):
        weights = rng.choice([0.0, 0.5, 1.0], size=length)
        weights[0] = 0
        documents.append(sample(rng.integers(1, 99, size=length), weights, f"rows:{length}"))
    batch = make_batch(documents)
    ids, positions, targets, weights = [], [], [], []
    for document in documents:
        for at, token_id in enumerate(document.ids.tolist()):
            last = at + 1 == len(document)
            ids.append(token_id)
            positions.append(at)
            targets.append(0 if last else int(document.ids[at + 1]))
            weights.append(0.0 if last else float(document.weights[at + 1]))
    assert batch.input_ids.tolist() == ids and batch.positions.tolist() == positions
    assert batch.targets.tolist() == targets and batch.weights.tolist() == weights
    assert batch.bounds == (0, 1, 6, 8, 25, 26, 29) and batch.num_tokens == 29
    assert batch.num_trained == sum(weights)
    assert batch.where == tuple(document.where for document in documents)
    assert batch.input_ids.dtype == batch.positions.dtype == batch.targets.dtype == torch.int64
    assert batch.weights.dtype == torch.float32
