"""Documents out of a piece of a corpus, one after the other, each with its line or row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oarsmith.data.corpus.files import Layout, Piece, is_separator, open_bytes, unreadable
from oarsmith.data.records import ReadLog, read_records
from oarsmith.errors import DataError

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Document:
    """A text and its place: the line (of its beginning) or row, counted from 1 within the piece."""

    text: str
    place: int


@dataclass(frozen=True, slots=True)
class Malformed:
    """What should have been a document and is none; `fix` is for the person who reads it."""

    what: str
    fix: str
    place: int


@dataclass(slots=True)
class Passed:
    """What a reader went over, filled while its documents are consumed."""

    places: int = 0
    blank: int = 0


def read_documents(piece: Piece, layout: Layout, passed: Passed) -> Iterator[Document | Malformed]:
    """The documents of a piece in the order of the file.

    Raises DataError for a file that cannot be read at all: compressed and cut off, no parquet, no such column.
    """
    match piece.kind:
        case "lines":
            return _json_documents(piece, layout, passed)
        case "text":
            return _text_documents(piece, layout, passed)
        case "parquet":
            return _parquet_documents(piece, layout, passed)
        case "records":
            return _record_documents(piece, layout, passed)


def lines_before(piece: Piece) -> int:
    """Lines of the file in front of the piece; reads that part of it."""
    if piece.kind not in ("lines", "text") or piece.start == 0:
        return 0
    count, left = 0, piece.start
    with Path(piece.path).open("rb") as file:
        while left:
            chunk = file.read(min(left, 1 << 20))
            count, left = count + chunk.count(b"\n"), left - len(chunk)
    return count


def rows_before(piece: Piece) -> int:
    """Rows (or lines) of the file in front of the piece."""
    if piece.kind != "parquet":
        return lines_before(piece)
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_metadata(piece.path)
    return sum(metadata.row_group(group).num_rows for group in range(piece.start))


def _lines(piece: Piece, passed: Passed) -> Iterator[bytes]:
    """Lines with their ends; `passed.places` is the number of the line given last."""
    left = None if piece.stop is None else piece.stop - piece.start
    with open_bytes(piece) as opened:
        for line in opened:
            if left is not None:
                if left <= 0:
                    return
                left -= len(line)
            passed.places += 1
            yield line.removeprefix(_BOM) if passed.places == 1 and piece.start == 0 else line


def _json_documents(piece: Piece, layout: Layout, passed: Passed) -> Iterator[Document | Malformed]:
    for line in _lines(piece, passed):
        if line.isspace():
            passed.blank += 1
            continue
        try:
            row = json.loads(line)
        except UnicodeDecodeError as error:
            yield _not_utf8(line, error, passed.places)
        except (ValueError, RecursionError) as error:
            why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            yield Malformed(
                f"the line is not JSON: {why}; it begins with {_beginning(line.decode('utf-8', 'replace'))}",
                "put one complete JSON object on each line; a plain text file is named .txt",
                passed.places,
            )
        else:
            yield _text_of(row, layout, passed.places)


def _text_of(row: Any, layout: Layout, place: int) -> Document | Malformed:
    if not isinstance(row, dict):
        return Malformed(
            f"the row is a {type(row).__name__} ({_beginning(str(row))}), not an object",
            f'write each row as a JSON object, such as {{"{layout.json_key}": "..."}}',
            place,
        )
    text = row.get(layout.json_key)
    if isinstance(text, str):
        return Document(text, place)
    if layout.json_key in row:
        return Malformed(
            f"'{layout.json_key}' is {'null' if text is None else f'a {type(text).__name__}'}, not a text",
            "name the field that holds the text with --json_key",
            place,
        )
    names = ", ".join(map(repr, list(row)[:8])) or "no fields"
    return Malformed(f"no field '{layout.json_key}'; the row has {names}", "name the field with --json_key", place)


def _text_documents(piece: Piece, layout: Layout, passed: Passed) -> Iterator[Document | Malformed]:
    if layout.text_documents == "line":
        for line in _lines(piece, passed):
            if line.isspace():
                passed.blank += 1
            else:
                yield _decoded([line], passed.places)
        return
    held: list[bytes] = []
    for line in _lines(piece, passed):
        if layout.text_documents == "separated" and is_separator(line, layout):
            if held:
                yield _decoded(held, passed.places - len(held))
            held = []
        elif held or not line.isspace():
            held.append(line)
        else:
            passed.blank += 1
    if held:
        yield _decoded(held, passed.places + 1 - len(held))


def _decoded(lines: list[bytes], place: int) -> Document | Malformed:
    whole = b"".join(lines)
    try:
        return Document(whole.decode("utf-8").strip("\r\n"), place)
    except UnicodeDecodeError as error:
        return _not_utf8(whole, error, place + whole.count(b"\n", 0, error.start))


def _not_utf8(data: bytes, error: UnicodeDecodeError, place: int) -> Malformed:
    line_start = data.rfind(b"\n", 0, error.start) + 1
    return Malformed(
        f"not UTF-8 (byte {error.start - line_start} of the line: 0x{data[error.start]:02x})",
        "save the file as UTF-8: iconv -f ENCODING -t UTF-8",
        place,
    )


def _parquet_documents(piece: Piece, layout: Layout, passed: Passed) -> Iterator[Document | Malformed]:
    import pyarrow
    import pyarrow.parquet

    path = Path(piece.path)
    assert piece.stop is not None, piece
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if layout.json_key not in file.schema_arrow.names:
                names = ", ".join(map(repr, file.schema_arrow.names))
                raise DataError(
                    f"no column '{layout.json_key}'; the file has {names}",
                    where=piece.path,
                    fix="name the column with --json_key",
                )
            groups = range(piece.start, piece.stop)
            for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[layout.json_key]):
                for text in _values(batch.column(0)):
                    passed.places += 1
                    if isinstance(text, UnicodeDecodeError):
                        yield _not_utf8(text.object, text, passed.places)
                    else:
                        yield _text_of({layout.json_key: text}, layout, passed.places)
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(path, "parquet", error) from error


def _values(column: Any) -> list[Any]:
    """The values of an Arrow array; an error in place of a text that is not UTF-8, which files may hold unchecked."""
    try:
        found: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        found = [_decoded_value(value) for value in column.cast("large_binary").to_pylist()]
    return found


def _decoded_value(value: bytes | None) -> str | UnicodeDecodeError | None:
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError as error:
        return error


def _record_documents(piece: Piece, layout: Layout, passed: Passed) -> Iterator[Document | Malformed]:
    """CSV, and .json files that hold a list: small ones, read by what also reads fine-tuning data."""
    log = ReadLog()
    for record in read_records(piece.path, log=log, on_malformed="skip"):
        yield from _skipped(log, passed)
        passed.places += 1
        yield _text_of(record.value, layout, passed.places)
    yield from _skipped(log, passed)
    passed.blank = log.blank


def _skipped(log: ReadLog, passed: Passed) -> Iterator[Malformed]:
    for error in log.malformed:
        passed.places += 1
        yield Malformed(error.what, error.fix or "repair the row", passed.places)
    log.malformed.clear()


def _beginning(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")
