"""Rows out of files: jsonl, json, csv, parquet, folders and `datasets` names, each row with the place it came from."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from oarsmith.data.sources import find_split, is_saved_dataset, missing_file, read_datasets
from oarsmith.errors import DataError

OnMalformed = Literal["error", "skip"]

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")

# Columns that hold structures; csv has only text, so there they are JSON in a cell.
_STRUCTURED_COLUMNS = ("messages", "conversations", "history", "context")
_MAX_CSV_CELL = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Record:
    """One row: its fields and where it stands ("file:line", or "file:row n" where the format has no lines)."""

    value: dict[str, Any]
    where: str


@dataclass(slots=True)
class ReadLog:
    """What a reader met besides rows; filled while the rows are consumed."""

    blank: int = 0
    malformed: list[DataError] = field(default_factory=list)


def read_records(
    source: str | Path,
    split: str | None = None,
    *,
    log: ReadLog | None = None,
    on_malformed: OnMalformed = "error",
) -> Iterator[Record]:
    """Rows of `source`, one at a time and in file order.

    Args:
        source: a .jsonl, .json (a list, or JSON lines as PaddleNLP writes them), .csv or .parquet file; a folder with
            splits (`train.json`, `dev/*.json`, ...); a dataset saved by `datasets`; or the name of a hub dataset.
        split: which split of a folder or dataset, "train" where not given. A single file is read whole.
        log: counts blank lines, and with on_malformed="skip" collects the errors of the rows left out.
        on_malformed: "error" raises at the first row that is no JSON object, "skip" leaves it out and logs it.

    Raises:
        DataError: missing file or split, unreadable file, malformed row (with file:line).
    """
    log = ReadLog() if log is None else log
    for item in read_items(source, split, log=log):
        if isinstance(item, Record):
            yield item
        elif on_malformed == "error":
            raise item
        else:
            log.malformed.append(item)


def read_items(
    source: str | Path, split: str | None = None, *, log: ReadLog | None = None
) -> Iterator[Record | DataError]:
    """As `read_records`, with the error of a malformed row in the row's place."""
    log = ReadLog() if log is None else log
    path = Path(source)
    if path.is_dir() and not is_saved_dataset(path):
        for file in find_split(path, split or "train"):
            yield from _read_file(file, log)
    elif path.is_file():
        yield from _read_file(path, log)
    elif path.is_dir() or _may_be_a_name(str(source)):
        for index, value in enumerate(read_datasets(str(source), split or "train"), start=1):
            yield Record(value, f"{source}[{split or 'train'}]:row {index}")
    else:
        raise missing_file(path)


def _may_be_a_name(source: str) -> bool:
    """Whether a source that is no path here can be a hub name ("owner/name" or "name")."""
    parts = source.split("/")
    looks_like_file = Path(source).suffix.lower() in (*DATA_SUFFIXES, ".txt", ".gz", ".zst")
    return not looks_like_file and len(parts) <= 2 and all(parts) and parts[0] not in (".", "..", "~")


def _read_file(path: Path, log: ReadLog) -> Iterator[Record | DataError]:
    suffix = path.suffix.lower()
    readers = {".csv": _read_csv, ".parquet": _read_parquet, ".jsonl": _read_json_lines, ".json": _read_json}
    if suffix not in readers:
        known = ", ".join(DATA_SUFFIXES)
        raise DataError(f"unknown data file type '{suffix}'", where=str(path), fix=f"use one of {known}")
    yield from readers[suffix](path, log)


def _object(value: Any, where: str) -> Record | DataError:
    if isinstance(value, dict):
        return Record(value, where)
    fix = 'write each row as a JSON object, such as {"src": "question", "tgt": "answer"}'
    found = "null" if value is None else f"a {type(value).__name__} ({_beginning(str(value))})"
    return DataError(f"the row is {found}, not an object", where=where, fix=fix)


def _read_json_lines(path: Path, log: ReadLog) -> Iterator[Record | DataError]:
    with path.open("rb") as lines:  # bytes: splits on \n only, and a bad encoding is one line's error
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not text.strip():
                log.blank += 1
                continue
            yield _parse_line(text.rstrip(b"\r\n"), where)


def _parse_line(line: bytes, where: str) -> Record | DataError:
    try:
        return _object(json.loads(line.decode("utf-8")), where)
    except UnicodeDecodeError as error:
        what = f"the line is not UTF-8 (byte {error.start}: 0x{line[error.start]:02x})"
        return DataError(what, where=where, fix="save the file as UTF-8")
    except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError, and integers of over 4300 digits
        why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        what = f"the line is not JSON: {why}; it begins with {_beginning(line.decode('utf-8', 'replace'))}"
        return DataError(what, where=where, fix="put one complete JSON object on each line")


def _read_json(path: Path, log: ReadLog) -> Iterator[Record | DataError]:
    """A .json file: a list of objects, or (PaddleNLP's train.json) one object on each line."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        yield from _read_json_lines(path, log)
        return
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the file is not UTF-8 (byte {error.start})", where=str(path), fix="save it as UTF-8"
        ) from error
    yield from _read_json_list(path, text)


def _read_json_list(path: Path, text: str) -> Iterator[Record | DataError]:
    decoder = json.JSONDecoder()
    at = _skip_space(text, 0) + 1
    line, counted = 1, 0
    while True:
        at = _skip_space(text, at)
        line, counted = line + text.count("\n", counted, at), at
        where = f"{path}:{line}"
        if text[at : at + 1] == "]":
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            # A broken element leaves no place to go on from: the error is final also when rows may be skipped.
            what = f"the list element is not JSON: {error}; it begins with {_beginning(text[at : at + 80])}"
            raise DataError(what, where=where, fix="repair the JSON, or use JSON lines") from error
        yield _object(value, where)
        at = _skip_space(text, at)
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "]":
            line += text.count("\n", counted, at)
            found = _beginning(text[at : at + 40]) if text[at:] else "the end of the file"
            raise DataError(
                f"expected ',' or ']' in the list, found {found}", where=f"{path}:{line}", fix="repair the JSON"
            )


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _read_csv(path: Path, log: ReadLog) -> Iterator[Record | DataError]:
    csv.field_size_limit(_MAX_CSV_CELL)  # the module's own limit of 131072 is below real rows
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        header: list[str] | None = None
        while True:
            first_line = rows.line_num + 1
            try:
                cells = next(rows, None)
            except (csv.Error, UnicodeDecodeError) as error:
                raise DataError(f"not readable as CSV: {error}", where=f"{path}:{first_line}") from error
            if cells is None:
                return
            if not cells:
                log.blank += 1
            elif header is None:
                header = cells
            else:
                yield _csv_row(header, cells, f"{path}:{first_line}")


def _csv_row(header: list[str], cells: list[str], where: str) -> Record | DataError:
    if len(cells) != len(header):
        what = f"the row has {len(cells)} cells, the header {len(header)} ({', '.join(header)})"
        return DataError(what, where=where, fix="quote cells that hold commas or line breaks")
    value: dict[str, Any] = dict(zip(header, cells, strict=True))
    for name in _STRUCTURED_COLUMNS:
        if value.get(name):
            try:
                value[name] = json.loads(value[name])
            except (ValueError, RecursionError) as error:
                what = f"column '{name}' is not JSON: {error}; it begins with {_beginning(str(value[name]))}"
                return DataError(what, where=where, fix=f"write '{name}' as JSON")
        else:
            value.pop(name, None)
    return Record(value, where)


def _read_parquet(path: Path, log: ReadLog) -> Iterator[Record | DataError]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Record(value, f"{path}:row {number}")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"not readable as parquet: {error}", where=str(path), fix="the file may be cut; copy it again"
        ) from error


def _beginning(text: str) -> str:
    shown = text if len(text) <= 60 else text[:60] + "..."
    return repr(shown)
