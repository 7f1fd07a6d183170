"""A corpus to one pair of token files: shards made by many workers, kept when killed, put together in order.

The output is that of one worker going through all documents: bit for bit the same for any number of workers, for any
engine, and after any number of interruptions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from oarsmith.data.corpus.account import Account, places_before
from oarsmith.data.corpus.dedup import Signatures, find_duplicates
from oarsmith.data.corpus.engines import Engine
from oarsmith.data.corpus.files import Layout, Piece, find_files, piece_size, plan_pieces
from oarsmith.data.corpus.indexed import IndexedBuilder, IndexedDataset
from oarsmith.data.corpus.shard import Counts, Settings, Shard, finished, make_shard, marks_path
from oarsmith.data.corpus.workfolder import WorkFolder
from oarsmith.data.report import DropReason
from oarsmith.errors import DataError

DUPLICATE = {"exact": "same text as an earlier document", "minhash": "nearly the same as an earlier document"}
Progress = Callable[[int, int], None]
"""Called with (bytes of input, documents) whenever a shard is done."""


@dataclass(frozen=True)
class Corpus:
    """The files of a corpus and the pieces they are worked on in."""

    files: tuple[Path, ...]
    ignored: tuple[Path, ...]
    pieces: tuple[Piece, ...]
    num_bytes: int

    def fingerprint(self) -> list[list[Any]]:
        """Name, size and time of change of each file."""
        stats = [(file, file.stat()) for file in self.files]
        return [[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def open_corpus(paths: Sequence[str], layout: Layout, size: int | None = None) -> Corpus:
    """Find the files of a corpus. `size`: bytes of a piece, where not given by the size of the corpus.

    Raises DataError for paths without corpus files, and for an empty corpus.
    """
    files, ignored = find_files(paths)
    pieces = plan_pieces(files, layout, size or piece_size(files))
    num_bytes = sum(piece.num_bytes for piece in pieces)
    if num_bytes == 0:
        where = str(files[0]) if len(files) == 1 else ", ".join(paths)
        raise DataError("the corpus is empty", where=where, fix="check that these are the right files")
    return Corpus(tuple(files), tuple(ignored), tuple(pieces), num_bytes)


def write_corpus(
    corpus: Corpus,
    prefix: Path,
    settings: Settings,
    engine: Engine,
    work: WorkFolder,
    *,
    max_documents: int | None = None,
    progress: Progress = lambda num_bytes, documents: None,
) -> Account:
    """Encode a corpus into ``prefix.bin`` and ``prefix.idx``.

    Args:
        corpus: its files.
        prefix: of the output; what is there is replaced.
        settings: what becomes of a document.
        engine: who makes the shards.
        work: the folder for them; shards that are in it are used.
        max_documents: stop after so many documents that are neither malformed nor too short.
        progress: called for every shard.

    Raises:
        DataError: a document that cannot be read, a damaged file, a corpus of which nothing is kept.
    """
    begin = time.perf_counter()
    made = _Made(corpus, settings, engine, work.path, max_documents, progress)
    shards, counts = made.all()
    report = Account(
        files=len(corpus.files),
        ignored=_ignored(corpus.ignored),
        input_bytes=corpus.num_bytes,
        dtype=np.dtype(settings.encoding.dtype).name,
    )
    before = places_before(shards, counts)
    for shard, own, places in zip(shards, counts, before, strict=True):
        report.add(shard, own, places)
    if report.kept == 0:
        why = "; ".join(report.reasons()) or f"{report.blank:,} blank lines"
        raise DataError(
            f"no document is kept: {report.documents:,} read. {why}",
            where=str(corpus.files[0]),
            fix="check json_key, min_doc_length and, for text files, text_documents",
        )
    _put_together(shards, counts, before, prefix, settings, work.path, report)
    report.seconds, report.done_bytes = time.perf_counter() - begin, made.num_bytes
    return report


class _Made:
    """The shards of a corpus, those that are there and those to be made."""

    def __init__(
        self,
        corpus: Corpus,
        settings: Settings,
        engine: Engine,
        folder: Path,
        max_documents: int | None,
        progress: Progress,
    ) -> None:
        self._shards = [Shard(number, piece) for number, piece in enumerate(corpus.pieces)]
        self._settings, self._engine, self._folder = settings, engine, folder
        self._wanted, self._progress = max_documents, progress
        self._counts: dict[int, Counts] = {}
        self.num_bytes = 0

    def all(self) -> tuple[list[Shard], list[Counts]]:
        """Make what is missing; the shards that are needed, with their counts."""
        for shard, counts in self._engine(self._missing(), self._settings, self._folder):
            self._note(shard, counts, made=True)
        number = self._cut()
        if number is None:
            return self._shards, [self._counts[shard.number] for shard in self._shards]
        return self._limited(number)

    def _note(self, shard: Shard, counts: Counts, *, made: bool) -> None:
        self._counts[shard.number] = counts
        self.num_bytes += shard.piece.num_bytes if made else 0
        self._progress(shard.piece.num_bytes, counts.documents)

    def _missing(self) -> Iterator[Shard]:
        for shard in self._shards:
            if self._cut() is not None:
                return
            counts = finished(shard, self._folder)
            if counts is None:
                yield shard
            else:
                self._note(shard, counts, made=False)

    def _cut(self) -> int | None:
        """The shard in which the last wanted document lies, if all before it are made."""
        if self._wanted is None:
            return None
        total = 0
        for shard in self._shards:
            if shard.number not in self._counts:
                return None
            total += self._counts[shard.number].accepted
            if total >= self._wanted:
                return shard.number
        return None

    def _limited(self, number: int) -> tuple[list[Shard], list[Counts]]:
        """The shards up to `number`, which is made again so that it ends with the last wanted document."""
        assert self._wanted is not None
        shards = self._shards[:number]
        counts = [self._counts[shard.number] for shard in shards]
        left = self._wanted - sum(own.accepted for own in counts)
        # Under another number: the whole shard stays for a job that goes on from here.
        last = replace(self._shards[number], number=len(self._shards), limit=left)
        return [*shards, last], [*counts, make_shard(last, self._settings, self._folder)]


def _ignored(files: Sequence[Path]) -> DropReason:
    reason = DropReason()
    for file in files:
        reason.add(str(file))
    return reason


def _put_together(
    shards: Sequence[Shard],
    counts: Sequence[Counts],
    before: Sequence[int],
    prefix: Path,
    settings: Settings,
    folder: Path,
    report: Account,
) -> None:
    filled = [(shard, places) for shard, own, places in zip(shards, counts, before, strict=True) if own.kept]
    marks = _marks(filled, folder) if settings.dedup.kind != "none" else []
    gone = find_duplicates([signatures for signatures, _ in marks], settings.dedup) if marks else None
    start = 0
    with IndexedBuilder(prefix, settings.encoding.dtype) as builder:
        for index, (shard, places_in_front) in enumerate(filled):
            if gone is None:
                builder.append(shard.prefix(folder))
                continue
            places = marks[index][1]
            own = gone[start : start + len(places)]
            start += len(places)
            if not own.any():
                builder.append(shard.prefix(folder))
                continue
            dataset = IndexedDataset(shard.prefix(folder))
            for document in np.flatnonzero(own).tolist():
                where = shard.piece.where(int(places[document]) + places_in_front)
                report.remove(DUPLICATE[settings.dedup.kind], where, int(dataset.sizes[document]))
            for document in np.flatnonzero(~own).tolist():
                builder.add(dataset.read(document))
                builder.end_document()


def _marks(filled: Sequence[tuple[Shard, int]], folder: Path) -> list[tuple[Signatures, npt.NDArray[np.int64]]]:
    found = []
    for shard, _ in filled:
        with np.load(marks_path(shard.prefix(folder))) as file:
            found.append((file["signatures"], file["places"]))
    return found


def plan_of(corpus: Corpus, settings: Settings, tokenizer_fingerprint: str) -> dict[str, Any]:
    """All that decides the shards, as plain values: a later job with the same plan can use them."""
    layout, cleaning, dedup = settings.layout, settings.cleaning, settings.dedup
    plan: Mapping[str, Any] = {
        "tokenizer": tokenizer_fingerprint,
        "append_eos": settings.encoding.eos is not None,
        "add_special_tokens": settings.encoding.add_special_tokens,
        "json_key": layout.json_key,
        "text_documents": layout.text_documents,
        "doc_spliter": layout.separator,
        "min_doc_length": cleaning.min_length,
        "max_repeated_len": cleaning.max_repeated,
        "dedup": dedup.kind,
        "minhash_num_perm": dedup.num_perm,
        "on_malformed": "skip" if settings.skip_malformed else "error",
        "pieces": [[piece.start, piece.stop] for piece in corpus.pieces],
        "files": corpus.fingerprint(),
    }
    return dict(plan)
