"""Several pairs of token files to one, end to end, in the order given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from oarsmith.data.corpus.indexed import IndexedBuilder, IndexedDataset
from oarsmith.errors import DataError


def find_pairs(paths: Sequence[str]) -> list[Path]:
    """Prefixes of pairs: those named, with or without their endings, and those of a directory sorted by name.

    Raises DataError for a directory without pairs, and for fewer than two pairs in all.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [index.with_suffix("") for index in sorted(path.glob("*.idx"))]
            if not inside:
                raise DataError("no .idx file in the directory", where=str(path), fix="name pairs of .bin and .idx")
            found += inside
        else:
            found.append(path.with_suffix("") if path.suffix in (".bin", ".idx") else path)
    if len(found) < 2:
        raise DataError(
            f"{len(found)} pair: nothing to merge", where=str(found[0]), fix="name a directory of pairs, or several"
        )
    return found


def merge_pairs(pairs: Sequence[Path], prefix: Path) -> tuple[int, int]:
    """Write the documents of all pairs into one; returns (documents, tokens).

    Raises:
        DataError: a pair that is missing or malformed, or of another token type than the first.
    """
    if prefix.resolve() in {pair.resolve() for pair in pairs}:
        raise DataError("the output is one of the pairs that are read", where=str(prefix), fix="name another output")
    datasets = [IndexedDataset(pair) for pair in pairs]
    with IndexedBuilder(prefix, datasets[0].dtype) as builder:
        for pair in pairs:
            builder.append(pair)
    return sum(len(one.doc_idx) - 1 for one in datasets), sum(int(one.sizes.sum(dtype="int64")) for one in datasets)
