"""Answers on their way into a file: kept beside it until all are there, so that what is killed goes on from them.

The folder ``OUTPUT.partial`` holds

- ``answers.jsonl``: a line for each row that is done, in the order of the rows;
- ``rows.txt``: for each of them the digest of the row and that of its line, which says what may be trusted;
- ``settings.json``: what the answers depend on beside the rows.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from oarsmith.atomic import atomic_write_text, remove_directory
from oarsmith.errors import ConfigError, DataError, OarsmithError

_ANSWERS, _ROWS, _SETTINGS, _LOCK = "answers.jsonl", "rows.txt", "settings.json", "lock"
_DIGITS = 32
_RECORD = 2 * _DIGITS + 2
ERROR_START = b'{"error":'
"""How a line begins that stands for a row which could not be answered."""


class KeptAnswers:
    """The answers to the first ``num_done`` rows.

    Attributes:
        num_errors: how many of them say what is wrong with their row instead.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_done = self.num_errors = 0
        self._answers = (folder / _ANSWERS).open("r+b", buffering=0)
        self._rows = (folder / _ROWS).open("r+b", buffering=0)
        self._find_end()

    def _find_end(self) -> None:
        """Drop what comes after the last line that is whole and the one that was written."""
        size = 0
        with (self.folder / _ANSWERS).open("rb") as answers, (self.folder / _ROWS).open("rb") as rows:
            for line in answers:
                record = rows.read(_RECORD)
                if len(record) < _RECORD or record[_DIGITS + 1 : -1] != _digest(line):
                    break
                size += len(line)
                self.num_done += 1
                self.num_errors += line.startswith(ERROR_START)
        for file, end in ((self._answers, size), (self._rows, self.num_done * _RECORD)):
            file.truncate(end)
            file.seek(end)

    def check(self, index: int, digest: str, where: str | None) -> None:
        """Whether the row that was answered as number ``index`` is still the same.

        Raises:
            DataError: it is not.
        """
        if os.pread(self._rows.fileno(), _DIGITS, index * _RECORD) != digest.encode():
            raise DataError(
                f"row {index + 1} is not the one that was answered: the input has changed since",
                where=where,
                fix=f"bring the old rows back to use the {self.num_done:,} answers in {self.folder}, "
                "or begin anew with --overwrite_output_file",
            )

    def append(self, digest: str, answer: bytes) -> None:
        """The answer to the next row, a JSON text without line breaks."""
        line = answer + b"\n"
        _write(self._answers, line)
        _write(self._rows, digest.encode() + b" " + _digest(line) + b"\n")
        self.num_done += 1
        self.num_errors += line.startswith(ERROR_START)

    def move_to(self, output: Path) -> None:
        """Put the answers in their place; all are there."""
        os.fsync(self._answers.fileno())
        (self.folder / _ANSWERS).replace(output)

    def close(self) -> None:
        self._answers.close()
        self._rows.close()


@contextmanager
def keep_answers(output: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> Iterator[KeptAnswers]:
    """The answers that were made for ``output`` before, to be continued.

    They come into their place when the block succeeds, and stay in their folder when it fails.

    Args:
        settings: all that decides answers, beside the rows (plain JSON values).
        overwrite: forget them.

    Raises:
        OarsmithError: they were made with other settings; or another process is at it.
    """
    output = Path(os.path.realpath(output))
    folder = output.with_name(f"{output.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OarsmithError(
                "another process is answering into this file", where=str(output), fix="wait for it, or name another one"
            ) from None
        _prepare(folder, output, json.loads(json.dumps(settings)), overwrite=overwrite)
        kept = KeptAnswers(folder)
        complete = False
        try:
            yield kept
            kept.move_to(output)
            complete = True
        finally:
            kept.close()
            if complete or not kept.num_done:
                remove_directory(folder)


def _prepare(folder: Path, output: Path, settings: dict[str, Any], *, overwrite: bool) -> None:
    """Make the folder one of answers with these settings."""
    before = None if overwrite else _read_settings(folder)
    if before is not None and before != settings:
        raise ConfigError(
            f"the answers that are there were made with {_difference(before, settings)}",
            where=str(folder),
            fix="give the same keys to go on from them, or begin anew with --overwrite_output_file",
        )
    if before is not None and not (folder / _ANSWERS).exists() and output.is_file():
        # Killed when the answers were in their place already, and only the folder had to go.
        output.replace(folder / _ANSWERS)
    elif before is None or not (folder / _ANSWERS).exists():
        (folder / _SETTINGS).unlink(missing_ok=True)
        for name in (_ANSWERS, _ROWS):
            (folder / name).write_bytes(b"")
        # Last: where it is, the others were.
        atomic_write_text(folder / _SETTINGS, json.dumps(settings, indent=1, ensure_ascii=False))


def _read_settings(folder: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    other = [key for key in {**now, **before} if before.get(key) != now.get(key)]
    shown = []
    for key in other:
        was = json.dumps(before.get(key), ensure_ascii=False)
        # A digest tells nobody anything.
        shown.append(f"{key} {was}" if len(was) < 60 and not key.startswith("content of") else f"another {key}")
    return ", ".join(shown)


def _digest(line: bytes) -> bytes:
    return hashlib.blake2b(line, digest_size=_DIGITS // 2).hexdigest().encode()


def _write(file: FileIO, data: bytes) -> None:
    """All of it: an unbuffered file may take less, on a disk that is nearly full."""
    while data:
        data = data[file.write(data) :]
