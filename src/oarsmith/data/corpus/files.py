"""The files of a corpus and the pieces they are worked on in: ranges of bytes that begin with a document, row groups.

Only where a piece begins and ends is decided here, never by the number of workers. Documents are read by `documents`.
"""

from __future__ import annotations

import gzip
import io
import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from oarsmith.data.sources import missing_file
from oarsmith.errors import DataError

Kind = Literal["lines", "text", "parquet", "records"]
TextDocuments = Literal["separated", "line", "file"]

_KINDS: dict[str, Kind] = {
    ".jsonl": "lines",
    ".json": "lines",
    ".ndjson": "lines",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".parquet": "parquet",
    ".csv": "records",
}
_COMPRESSED = (".zst", ".gz")
SUFFIXES = (*_KINDS, *(f"{kind}{packed}" for kind in (".jsonl", ".json", ".txt") for packed in _COMPRESSED))
_CHUNK = 1 << 20
_MAX_WINDOW = 1 << 31  # what `zstd --long=31` writes


@dataclass(frozen=True)
class Layout:
    """Where the text stands in a file.

    Args:
        json_key: the field of a row (jsonl, parquet, ...) that holds the text.
        text_documents: what a document of a plain text file is: the lines up to a separating line, one line, the file.
        separator: the line, without white space at its ends, that separates documents; "" is a blank line.
    """

    json_key: str = "text"
    text_documents: TextDocuments = "separated"
    separator: str = ""


@dataclass(frozen=True)
class Piece:
    """A part of a file that is worked on as one.

    Attributes:
        path: the file.
        kind: how it is read.
        start, stop: bytes of the file, or row groups of a parquet file; the whole file where `stop` is None.
        num_bytes: its size on disk, for progress.
    """

    path: str
    kind: Kind
    start: int
    stop: int | None
    num_bytes: int

    def where(self, place: int) -> str:
        """A line or row, counted from 1 in the whole file, as users read it."""
        return f"{self.path}:{place}" if self.kind in ("lines", "text") else f"{self.path}:row {place}"


def find_files(paths: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Corpus files under `paths` in the order given, those of a directory sorted by name; and the files it ignores.

    Hidden files and directories are not looked at. Raises DataError for a path that does not exist, a file of an
    unknown type, and a directory without a corpus file.
    """
    found: list[Path] = []
    ignored: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(entry for entry in path.rglob("*") if entry.is_file() and not _hidden(entry, path))
            known = [entry for entry in inside if suffix_of(entry) in SUFFIXES]
            ignored += [entry for entry in inside if suffix_of(entry) not in SUFFIXES]
            if not known:
                raise DataError("no corpus file in the directory", where=str(path), fix=f"known: {', '.join(SUFFIXES)}")
            found += known
        elif not path.exists():
            raise missing_file(path)
        elif suffix_of(path) not in SUFFIXES:
            raise DataError(
                f"unknown type of corpus file '{suffix_of(path)}'",
                where=str(path),
                fix=f"rename it to what it is: {', '.join(SUFFIXES)}",
            )
        else:
            found.append(path)
    twice = {path for path in found if found.count(path) > 1} if len(found) < 1000 else set()
    if twice:
        raise DataError("the file is given twice", where=str(min(twice)), fix="name it once")
    return found, ignored


def _hidden(path: Path, root: Path) -> bool:
    """Hidden files, and the reports of corpora that were made into this directory."""
    index = path.with_name(path.name.removesuffix(".report.json") + ".idx")
    own = path.name.endswith(".report.json") and index.is_file()
    return own or any(part.startswith(".") for part in path.relative_to(root).parts)


def suffix_of(path: Path) -> str:
    """The suffix that says what a file is, with that of its compression: ``.jsonl.zst``."""
    last = path.suffix.lower()
    return Path(path.stem).suffix.lower() + last if last in _COMPRESSED else last


def piece_size(files: Sequence[Path]) -> int:
    """Bytes of a piece: small enough to keep workers busy and to lose little when killed, but not tiny."""
    return min(max(sum(file.stat().st_size for file in files) // 64, 1 << 21), 1 << 26)


def plan_pieces(files: Sequence[Path], layout: Layout, size: int) -> list[Piece]:
    """The pieces of all files, in the order of their documents; each begins with a document.

    A compressed file is one piece: there is no way into its middle.
    """
    pieces: list[Piece] = []
    for file in files:
        suffix = suffix_of(file)
        num_bytes = file.stat().st_size
        kind = _KINDS[suffix.removesuffix(".zst").removesuffix(".gz")]
        if kind == "parquet":
            pieces += _row_groups(file, size)
        elif suffix == ".json" and _is_list(file):
            pieces.append(Piece(str(file), "records", 0, None, num_bytes))
        elif kind == "records" or suffix.endswith(_COMPRESSED) or (kind == "text" and layout.text_documents == "file"):
            pieces.append(Piece(str(file), kind, 0, None, num_bytes))
        else:
            bounds = [0, *_cuts(file, kind, layout, size, num_bytes), num_bytes]
            ranges = itertools.pairwise(bounds)
            pieces += [Piece(str(file), kind, start, stop, stop - start) for start, stop in ranges if stop > start]
    return pieces


def _is_list(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _cuts(file: Path, kind: Kind, layout: Layout, size: int, num_bytes: int) -> Iterator[int]:
    """Offsets about `size` bytes apart at which a document begins."""
    needs_separator = kind == "text" and layout.text_documents == "separated"
    at = size
    with file.open("rb") as opened:
        while at < num_bytes:
            opened.seek(at - 1)
            line = opened.readline()  # to the end of the line that holds byte at - 1
            while needs_separator and line and not is_separator(opened.readline(), layout, at_end=True):
                pass
            here = opened.tell()
            if here >= num_bytes:
                return
            yield here
            at = here + size


def is_separator(line: bytes, layout: Layout, *, at_end: bool = False) -> bool:
    """Whether a line of a text file separates documents. `at_end`: what stands for the end of the file."""
    if not line:
        return at_end
    return line.strip() == layout.separator.encode("utf-8")


def _row_groups(file: Path, size: int) -> list[Piece]:
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(file, "parquet", error) from error
    pieces: list[Piece] = []
    start, held = 0, 0
    for group in range(metadata.num_row_groups):
        held += max(metadata.row_group(group).total_byte_size, 1)
        if held >= size or group == metadata.num_row_groups - 1:
            pieces.append(Piece(str(file), "parquet", start, group + 1, held))
            start, held = group + 1, 0
    return pieces


def unreadable(path: Path, name: str, error: Exception) -> DataError:
    """The error for a file that is damaged or not what its name says."""
    return DataError(
        f"not readable as {name}: {error}", where=str(path), fix="the file may be cut off or damaged; copy it again"
    )


def open_bytes(piece: Piece) -> BinaryIO:
    """The bytes of a file, decompressed, from the start of the piece on.

    Reading raises DataError where a compressed file is damaged or cut off.
    """
    path = Path(piece.path)
    if path.suffix.lower() in _COMPRESSED:
        chunks = _zst(path) if path.suffix.lower() == ".zst" else _gz(path)
        return io.BufferedReader(_Chunks(chunks), _CHUNK)
    opened = path.open("rb")
    opened.seek(piece.start)
    return opened


def _gz(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) as opened:
            while chunk := opened.read(_CHUNK):
                yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise unreadable(path, "gzip", error) from error


def _zst(path: Path) -> Iterator[bytes]:
    """zstandard's own stream reader takes the end of a cut file for the end of the text, so frames are counted here."""
    import zstandard

    frame = None
    try:
        with path.open("rb") as opened:
            while chunk := opened.read(_CHUNK):
                while chunk:
                    if frame is None:
                        frame = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj()
                    yield frame.decompress(chunk)
                    chunk = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise unreadable(path, "zstd", error) from error
    if frame is not None:
        raise unreadable(path, "zstd", EOFError("the last frame is not complete"))


class _Chunks(io.RawIOBase):
    """A stream over byte strings of any length."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # BufferedReader hands over a memoryview
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        taken = min(len(buffer), len(self._rest))
        buffer[:taken] = self._rest[:taken]
        self._rest = self._rest[taken:]
        return taken
