"""The files of a tokenizer directory: reading them, and what each may hold. Sizes are limited: they are untrusted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oarsmith.errors import CheckpointError

MAX_FILE_BYTES = 512 * 2**20
"""The largest file read whole; the largest known tokenizer.json is 35 MB."""


def read_some(directory: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """The content of those files that exist. Raises CheckpointError for one that cannot be read or is too large."""
    files = {}
    for name in names:
        file = directory / name
        if not file.is_file():
            continue
        try:
            size = file.stat().st_size
            if size > MAX_FILE_BYTES:
                raise CheckpointError(
                    f"the file has {size:,} bytes, more than the {MAX_FILE_BYTES:,} a tokenizer's file may have",
                    where=str(file),
                    fix="copy or download it again",
                )
            files[name] = file.read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read the file: {error.strerror}", where=str(file)) from error
    return files


def json_object(files: Mapping[str, bytes], name: str, directory: Path) -> dict[str, Any]:
    """The object in a JSON file, {} when the file is absent."""
    if name not in files:
        return {}
    try:
        content = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not valid JSON: {error}", where=str(directory / name)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"holds a {type(content).__name__}, not an object", where=str(directory / name))
    return content


def text_of(data: bytes, file: Path) -> str:
    """A text file's content. Raises CheckpointError when it is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"not UTF-8 text: {error}", where=str(file)) from error
