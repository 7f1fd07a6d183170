"""Token-major batches: documents end to end, no padding.

Shape suffix: T tokens of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from oarsmith.data.samples import Sample


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Documents one after the other.

    Attributes:
        input_ids: [T] int64.
        positions: [T] int64, from 0 in each document.
        bounds: borders of the documents, from 0 to T, ascending: document d is bounds[d]:bounds[d + 1].
        targets: [T] int64, the token to be predicted at t; 0 with weight 0 at the last token of a document.
        weights: [T] float32, loss weight of the target.
        num_tokens: T.
        num_trained: sum of the weights (a float: weights need not be 0 or 1).
        where: of each document, file:line or what else names it.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    bounds: tuple[int, ...]
    targets: torch.Tensor
    weights: torch.Tensor
    num_tokens: int
    num_trained: float
    where: tuple[str, ...]

    @property
    def prompts(self) -> list[int]:
        """Of each document, the tokens before the first target that is trained on; all of it, if none is."""
        trained = self.weights.nonzero()[:, 0].numpy()
        starts = np.array(self.bounds)
        first = np.append(trained, starts[-1])[np.searchsorted(trained, starts[:-1])]
        return [int(size) for size in np.minimum(first + 1, starts[1:]) - starts[:-1]]


def make_batch(samples: Sequence[Sample]) -> Batch:
    """One batch of the samples in the given order."""
    assert samples, "a batch needs a sample"
    lengths = [len(sample) for sample in samples]
    assert min(lengths) > 0, f"an empty sample: {samples[lengths.index(0)].where}"
    ids_T = np.concatenate([sample.ids for sample in samples]).astype(np.int64)
    sample_weights_T = np.concatenate([sample.weights for sample in samples]).astype(np.float32)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    targets_T = np.append(ids_T[1:], 0)
    weights_T = np.append(sample_weights_T[1:], np.float32(0))
    last_of_document = bounds[1:] - 1
    targets_T[last_of_document] = 0
    weights_T[last_of_document] = 0
    return assemble(ids_T, targets_T, weights_T, bounds=bounds, where=tuple(sample.where for sample in samples))


def assemble(
    ids_T: npt.NDArray[np.int64],
    targets_T: npt.NDArray[np.int64],
    weights_T: npt.NDArray[np.float32],
    *,
    bounds: npt.NDArray[np.int64],
    where: tuple[str, ...],
) -> Batch:
    """A batch of finished parts; positions begin anew at every border of `bounds`."""
    lengths = np.diff(bounds)
    assert len(where) == len(lengths) and bounds[-1] == len(ids_T) and lengths.min() > 0, f"{bounds} of {len(ids_T)}"
    positions_T = np.arange(len(ids_T), dtype=np.int64) - np.repeat(bounds[:-1], lengths)
    return Batch(
        input_ids=torch.from_numpy(ids_T),
        positions=torch.from_numpy(positions_T),
        bounds=tuple(bounds.tolist()),
        targets=torch.from_numpy(targets_T),
        weights=torch.from_numpy(weights_T),
        num_tokens=len(ids_T),
        num_trained=float(weights_T.sum(dtype=np.float64)),
        where=where,
    )
