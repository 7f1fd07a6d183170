"""PoSE: positions that skip, so that short documents train distances of long ones (Zhu et al. 2023, section 3.2).

Shapes: T tokens of a batch, N documents of it, C chunks of a document.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from oarsmith.data.batch import Batch


@dataclass(frozen=True, kw_only=True)
class Pose:
    """How documents are spread over a longer context.

    A document of L tokens is cut at random places into chunks. The first keeps its positions; chunk i is moved on by
    u_i, drawn uniformly from u_{i-1}, ..., num_positions - L. The text stays whole (v_i = 0 in the paper, which finds
    little difference between its choices): documents' borders, targets and weights are those of the batch.

    Args:
        num_positions: the stretched context. A longer document keeps its positions.
        num_chunks: chunks of a document; fewer where two cuts fall on one place.
        seed: of the run; the draws are keyed by (seed, "pose", epoch, batch).
    """

    num_positions: int
    num_chunks: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        assert self.num_positions > 0 and self.num_chunks > 1, self

    def apply(self, batch: Batch, *, epoch: int, index: int) -> Batch:
        """Batch ``index`` of an epoch with skipping positions: a pure function of the arguments."""
        bounds = np.asarray(batch.bounds, dtype=np.int64)
        lengths_N, num_moved = np.diff(bounds), self.num_chunks - 1
        draws_N2C = self._draws(epoch, index, len(lengths_N) * 2 * num_moved).reshape(len(lengths_N), 2, num_moved)
        cuts_NC = np.sort(1 + np.floor(draws_N2C[:, 0] * (lengths_N[:, None] - 1)).astype(np.int64), axis=1)
        room_N = np.maximum(self.num_positions - lengths_N, 0)
        skip_T, skipped_N = np.zeros(batch.num_tokens, dtype=np.int64), np.zeros_like(lengths_N)
        inside_T = np.arange(batch.num_tokens) - np.repeat(bounds[:-1], lengths_N)
        for chunk in range(num_moved):
            skip_N = np.floor(draws_N2C[:, 1, chunk] * (room_N - skipped_N + 1)).astype(np.int64)
            skipped_N += skip_N
            skip_T += np.repeat(skip_N, lengths_N) * (inside_T >= np.repeat(cuts_NC[:, chunk], lengths_N))
        return replace(batch, positions=batch.positions + torch.from_numpy(skip_T))

    def _draws(self, epoch: int, index: int, count: int) -> npt.NDArray[np.float64]:
        """Uniform in [0, 1): the upper 53 bits of raw counter-based draws, which no version of numpy changes."""
        key = np.random.SeedSequence([self.seed & (2**64 - 1), zlib.crc32(b"pose"), epoch, index])
        raw = np.random.Philox(key).random_raw(count) >> np.uint64(11)
        return np.asarray(raw, dtype=np.float64) * 2.0**-53
