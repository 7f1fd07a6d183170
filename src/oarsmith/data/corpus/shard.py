"""What a worker does with one piece of a corpus: read, clean, encode, write a pair of token files, count.

A shard is finished when its ``.json`` is there, which is written last. It depends on the piece and the settings alone,
so it does not matter who makes it, and when.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from oarsmith.atomic import atomic_file, atomic_write_text
from oarsmith.data.corpus.clean import Cleaning
from oarsmith.data.corpus.dedup import Dedup, Signatures, Signer
from oarsmith.data.corpus.documents import Document, Malformed, Passed, read_documents, rows_before
from oarsmith.data.corpus.files import Layout, Piece
from oarsmith.data.corpus.indexed import IndexedBuilder
from oarsmith.data.corpus.tokenize import Encoder, Encoding, Ids
from oarsmith.errors import DataError, OarsmithError

_BATCH_CHARACTERS = 1 << 18
_MAX_EXAMPLES = 3
MALFORMED = "malformed"


@dataclass(frozen=True)
class Settings:
    """Everything that decides what becomes of a document. `skip_malformed`: else one stops the job."""

    layout: Layout
    cleaning: Cleaning
    encoding: Encoding
    dedup: Dedup
    skip_malformed: bool


@dataclass(frozen=True)
class Shard:
    """A piece of work. `limit`: documents to accept before it stops, None for all."""

    number: int
    piece: Piece
    limit: int | None = None

    def prefix(self, folder: Path) -> Path:
        """Its files in `folder` without their endings."""
        return folder / f"shard-{self.number:06d}"


@dataclass(slots=True)
class Gone:
    """Documents left out for one reason: how many, and (place, detail) of the first few."""

    count: int = 0
    examples: list[tuple[int, str]] = field(default_factory=list)

    def add(self, place: int, detail: str = "") -> None:
        """Counts one."""
        self.count += 1
        if len(self.examples) < _MAX_EXAMPLES:
            self.examples.append((place, detail))


@dataclass(slots=True)
class Counts:
    """What became of a piece. Places are lines or rows, counted from 1 within the piece.

    Attributes:
        places: lines or rows in all.
        blank: lines without a text between documents.
        documents: documents found, malformed ones included.
        accepted: of these, those that were clean; `kept` those that have tokens.
        gone: the others by reason.
        collapsed: kept documents in which a run of one character was collapsed.
        text_bytes: UTF-8 bytes of the kept documents, as encoded.
        slow: texts that fast encoding left to the tokenizer.
        longest: tokens and place of the longest document.
    """

    places: int = 0
    blank: int = 0
    documents: int = 0
    accepted: int = 0
    kept: int = 0
    gone: dict[str, Gone] = field(default_factory=dict)
    collapsed: int = 0
    tokens: int = 0
    text_bytes: int = 0
    slow: int = 0
    longest: tuple[int, int] = (0, 0)

    def leave_out(self, reason: str, place: int, detail: str = "") -> None:
        """Counts a document that goes."""
        self.gone.setdefault(reason, Gone()).add(place, detail)


@dataclass(frozen=True)
class Failed:
    """An `OarsmithError` on its way between processes, which exceptions with keywords do not survive."""

    kind: type[OarsmithError]
    what: str
    where: str | None
    fix: str | None

    def error(self) -> OarsmithError:
        """The error again."""
        return self.kind(self.what, where=self.where, fix=self.fix)


def work(shard: Shard, settings: Settings, folder: str) -> Counts | Failed:
    """Make a shard in `folder` and return its counts, or the error that the user can do something about."""
    try:
        return make_shard(shard, settings, Path(folder))
    except OarsmithError as error:
        return Failed(type(error), error.what, error.where, error.fix)


def make_shard(shard: Shard, settings: Settings, folder: Path) -> Counts:
    """Write the shard's files: .bin and .idx (none if no document is kept), .npz for duplicates, .json at the end."""
    counts, prefix = Counts(), shard.prefix(folder)
    encoder, signer = _encoder(settings.encoding), Signer(settings.dedup)
    slow_before = encoder.num_slow
    signatures: list[Signatures] = []
    places: list[int] = []
    batches = _encoded(_batches(_accepted(shard, settings, counts)), encoder, counts)
    first = next(batches, None)
    if first is not None:
        with IndexedBuilder(prefix, settings.encoding.dtype) as builder:
            for documents, ids in itertools.chain([first], batches):
                builder.add_documents(np.concatenate(ids), [len(own) for own in ids])
                if settings.dedup.kind != "none":
                    signatures.append(signer([document.text for document in documents]))
                    places += [document.place for document in documents]
    if signatures:
        with atomic_file(marks_path(prefix)) as file:
            np.savez(file, signatures=np.concatenate(signatures), places=np.array(places, np.int64))
    counts.slow = encoder.num_slow - slow_before
    atomic_write_text(counts_path(prefix), json.dumps({"limit": shard.limit, **asdict(counts)}))
    return counts


def counts_path(prefix: Path) -> Path:
    """Where the counts of a finished shard are."""
    return prefix.with_name(prefix.name + ".json")


def marks_path(prefix: Path) -> Path:
    """Where a shard's signatures and the places of its documents are."""
    return prefix.with_name(prefix.name + ".npz")


def finished(shard: Shard, folder: Path) -> Counts | None:
    """The counts of a shard that is finished, None for one that is not (or not with this limit)."""
    try:
        found: dict[str, Any] = json.loads(counts_path(shard.prefix(folder)).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if found.pop("limit") != shard.limit:
        return None
    gone = {
        reason: Gone(one["count"], [(place, detail) for place, detail in one["examples"]])
        for reason, one in found.pop("gone").items()
    }
    return Counts(**{**found, "longest": tuple(found["longest"])}, gone=gone)


@lru_cache(maxsize=1)
def _encoder(encoding: Encoding) -> Encoder:
    return Encoder(encoding)


def _accepted(shard: Shard, settings: Settings, counts: Counts) -> Iterator[Document]:
    """The clean documents of a piece; the others are counted."""
    passed = Passed()
    for found in read_documents(shard.piece, settings.layout, passed):
        if shard.limit is not None and counts.accepted == shard.limit:
            break
        counts.documents += 1
        document = _readable(found)
        if isinstance(document, Malformed):
            if not settings.skip_malformed:
                where = shard.piece.where(document.place + rows_before(shard.piece))
                raise DataError(document.what, where=where, fix=document.fix)
            counts.leave_out(MALFORMED, document.place, document.what)
            continue
        text = settings.cleaning.collapse(document.text)
        if settings.cleaning.too_short(text):
            counts.leave_out("too short", document.place, f"{len(text.strip())} characters")
            continue
        counts.accepted += 1
        counts.collapsed += text is not document.text
        yield Document(text, document.place)
    counts.places, counts.blank = passed.places, passed.blank


def _readable(found: Document | Malformed) -> Document | Malformed:
    if isinstance(found, Malformed) or found.text.isascii():
        return found
    try:
        found.text.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f"the text holds a lone surrogate, {found.text[error.start]!r}, at character {error.start}"
        return Malformed(what, "it is half of a character: repair or drop the row", found.place)
    return found


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += len(document.text)
        if held >= _BATCH_CHARACTERS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _encoded(
    batches: Iterator[list[Document]], encoder: Encoder, counts: Counts
) -> Iterator[tuple[list[Document], list[Ids]]]:
    """Documents with their ids; those without any are counted and left out."""
    for batch in batches:
        documents: list[Document] = []
        ids: list[Ids] = []
        for document, own in zip(batch, encoder.encode([document.text for document in batch]), strict=True):
            if len(own) == 0:
                counts.leave_out("no tokens", document.place)
                continue
            documents.append(document)
            ids.append(own)
            text = document.text
            counts.kept += 1
            counts.tokens += len(own)
            counts.text_bytes += len(text) if text.isascii() else len(text.encode("utf-8"))
            if len(own) > counts.longest[0]:
                counts.longest = len(own), document.place
        if documents:
            yield documents, ids
