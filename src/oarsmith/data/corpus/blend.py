"""Which token files a corpus is, and whose sample comes next.

The next sample is from the file furthest behind its share: of all files the one with the least (n + 1/2) / w, where n
samples of it have been given and w is its weight (the Webster / Sainte-Laguë rule). Sample k of a file is therefore due
at "time" (k + 1/2) / w, and the order is that of the due times. That has a closed form: any place is found without
walking there, nothing is stored, and the beginning does not depend on how many samples are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from oarsmith.data.corpus.indexed import idx_path
from oarsmith.data.corpus.legacy import npz_path
from oarsmith.errors import DataError

_SPAN = 1 << 14


@dataclass(frozen=True)
class Component:
    """A token file and its share of the samples, 0 to 1."""

    prefix: Path
    weight: float


def parse_blend(text: str) -> tuple[Component, ...]:
    """``prefix``, a directory (all pairs in it, equal weights), or ``weight path weight path ...``.

    Weights are of the samples drawn, whatever the sizes of the files; they need not add up to 1. A directory within a
    blend shares its weight equally among its pairs.

    Raises:
        DataError: a path without token files, or what is no blend.
    """
    words = text.split()
    if not words:
        raise DataError("no path is given", where="input_dir", fix="give the path of a .bin/.idx pair or a directory")
    if len(words) == 1 or _is_pair(Path(text)) or Path(text).exists():
        found = [(1.0, Path(text))]
    else:
        if len(words) % 2:
            what = f"'{text}' has {len(words)} words; a blend has a weight in front of every path"
            raise DataError(what, where="input_dir", fix="write it as '0.7 path/a 0.3 path/b'")
        found = [(_weight(word), Path(path)) for word, path in zip(words[::2], words[1::2], strict=True)]
    total = sum(weight for weight, _ in found)
    components = []
    for weight, path in found:
        prefixes = _pairs(path)
        components += [Component(prefix, weight / total / len(prefixes)) for prefix in prefixes]
    return tuple(components)


def _weight(word: str) -> float:
    try:
        weight = float(word)
    except ValueError:
        what = f"'{word}' stands where a weight is expected"
        raise DataError(what, where="input_dir", fix="write a blend as '0.7 path/a 0.3 path/b'") from None
    if not (weight > 0 and math.isfinite(weight)):
        raise DataError(f"the weight {word} is not above 0", where="input_dir", fix="leave out what has no weight")
    return weight


def _is_pair(prefix: Path) -> bool:
    return bool(prefix.name) and (idx_path(prefix).is_file() or npz_path(prefix).is_file())


def _pairs(path: Path) -> list[Path]:
    if _is_pair(path):
        return [path]
    if path.suffix in (".bin", ".idx") and _is_pair(path.with_suffix("")):
        return [path.with_suffix("")]
    if not path.is_dir():
        what = f"there is neither {idx_path(path).name} nor {npz_path(path).name}, and no directory of this name"
        fix = "give the path of a .bin/.idx pair without its ending, or make one with 'oarsmith preprocess'"
        raise DataError(what, where=str(path), fix=fix)
    names = {file.name[: -len(end)] for end in (".idx", "_idx.npz") for file in path.glob(f"[!.]*{end}")}
    if not names:
        fix = "make some with 'oarsmith preprocess'; directories within it are not searched"
        raise DataError("the directory has no .idx and no _idx.npz", where=str(path), fix=fix)
    return [path / name for name in sorted(names)]


class BlendOrder:
    """An endless sequence of files in proportion to their weights."""

    def __init__(self, weights: Sequence[float]) -> None:
        self._weights = np.asarray(weights, dtype=np.float64)
        self._weights /= self._weights.sum()
        self._block: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None

    def locate(self, index: int) -> tuple[int, int]:
        """(file, number within the file) of sample `index`."""
        before, files = self._block_with(index)
        at = index - int(before.sum())
        file = int(files[at])
        return file, int(before[file]) + int(np.count_nonzero(files[:at] == file))

    def counts(self, num_samples: int) -> npt.NDArray[np.int64]:
        """How many of the first samples come from each file."""
        if num_samples == 0:
            return np.zeros(len(self._weights), dtype=np.int64)
        before, files = self._block_with(num_samples - 1)
        part = files[: num_samples - int(before.sum())]
        return before + np.bincount(part, minlength=len(self._weights))

    def _block_with(self, index: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(samples of each file before the block, files of the block's samples) of the block that holds the index."""
        if self._block is not None:
            before, files = self._block
            if 0 <= index - int(before.sum()) < len(files):
                return self._block
        # As many samples as time has passed are due, give or take half a sample for each file.
        number = index // _SPAN
        while self._due_before(number * _SPAN).sum() > index:
            number -= 1
        while self._due_before((number + 1) * _SPAN).sum() <= index:
            number += 1
        before, after = self._due_before(number * _SPAN), self._due_before((number + 1) * _SPAN)
        files = np.repeat(np.arange(len(before)), after - before)
        starts = np.repeat(np.cumsum(after - before) - (after - before), after - before)
        numbers = np.arange(len(files)) - starts + before[files]
        order = np.argsort((numbers + 0.5) / self._weights[files], kind="stable")
        self._block = (before, files[order])
        return self._block

    def _due_before(self, time: int) -> npt.NDArray[np.int64]:
        """Samples of each file that are due before a time; decided by the very numbers that are sorted."""
        counts = np.floor(time * self._weights + 0.5)
        while (late := (counts > 0) & ((counts - 0.5) / self._weights >= time)).any():
            counts[late] -= 1
        while (early := (counts + 0.5) / self._weights < time).any():
            counts[early] += 1
        return counts.astype(np.int64)
