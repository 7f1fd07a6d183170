"""Log-probabilities of answers under the reference model: computed once, before training changes the model.

At that moment the model is the reference, so no second one is ever in memory. They are kept on disk, by everything they
follow from: weights, rows, number format.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from oarsmith.atomic import atomic_write_bytes
from oarsmith.compiling import cache_directory
from oarsmith.data.answers import Answered, make_answer_batch, of_like_length
from oarsmith.data.rows import fingerprint_of
from oarsmith.losses.answers import score_answers
from oarsmith.models.decoder import Decoder

References = npt.NDArray[np.float64]
# Files of the last runs; each has 8 bytes an answer.
_MOST_FILES = 64


def reference_file(rows: Sequence[Answered], model: str) -> Path:
    """Where those of the rows are kept.

    Args:
        model: everything that decides about its numbers, as text.
    """
    name = hashlib.sha256(f"{model}\n{fingerprint_of(rows)}".encode()).hexdigest()[:40]
    return cache_directory() / "references" / f"{name}.npy"


def read_references(file: Path, rows: Sequence[Answered]) -> References | None:
    """What was kept; None: nothing, or nothing that fits."""
    try:
        found = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = found.dtype == np.float64 and found.shape == (len(rows), len(rows[0].answers)) and np.isfinite(found).all()
    return found if fits else None


def keep_references(file: Path, found: References) -> None:
    """Keep them, unless the disk does not take them: they can be computed again."""
    buffer = io.BytesIO()
    np.save(buffer, found, allow_pickle=False)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(file, buffer.getvalue())
        for old in sorted(file.parent.glob("*.npy"), key=lambda path: path.stat().st_mtime)[:-_MOST_FILES]:
            old.unlink()


@torch.no_grad()
def compute_references(
    model: Decoder, rows: Sequence[Answered], *, share: bool, capacity: int, told: Callable[[int, int], None]
) -> References:
    """Log-probability of each answer [rows, answers] under the model as it is.

    Args:
        capacity: tokens of a batch.
        told: called after each batch with its tokens and its rows.
    """
    found, training = np.empty((len(rows), len(rows[0].answers))), model.training
    model.eval()
    for chosen in of_like_length(rows, share=share, capacity=capacity):
        batch = make_answer_batch([rows[index] for index in chosen], share=share)
        found[chosen] = score_answers(model, batch).sums_A.view(len(chosen), -1).cpu().numpy()
        told(batch.num_tokens, len(chosen))
    model.train(training)
    return found
