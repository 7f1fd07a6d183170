"""One given value and where it came from, and the key-value layers (file below command line) it is read from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oarsmith.errors import ConfigError

COMMAND_LINE = "command line"
META_KEY = "oarsmith"  # the one structured key of a file: what a saved run says about itself


@dataclass(frozen=True)
class Entry:
    """A value as given. ``rank`` orders the layers: a higher one wins. ``name`` is the name the user wrote."""

    name: str
    value: object
    where: str
    rank: int


@dataclass(frozen=True)
class FileLayer:
    """What a configuration file holds. ``meta`` is the block a saved run carries (empty for a hand-written file)."""

    entries: tuple[Entry, ...]
    meta: Mapping[str, Any]


def read_file(path: Path, rank: int = 0) -> FileLayer:
    """Read a JSON or YAML mapping of keys to values.

    Raises:
        ConfigError: missing file, bad syntax (with line), not a mapping, a key given twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(
            "there is no such configuration file", where=str(path), fix="check the path; a .json or .yaml file is meant"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 text ({error.reason})", where=str(path), fix="save it as UTF-8") from None
    if path.suffix.lower() in {".yaml", ".yml"}:
        raw, lines = _parse_yaml(text, path)
    else:
        raw, lines = _parse_json(text, path)
    meta = raw.pop(META_KEY, {})
    if not isinstance(meta, dict):
        raise ConfigError(f"the key '{META_KEY}' is for saved runs only", where=str(path), fix="remove it")
    entries = tuple(Entry(key, value, f"{path}:{lines.get(key, 1)}", rank) for key, value in raw.items())
    return FileLayer(entries, meta)


def _parse_json(text: str, path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ConfigError(f"given twice: {', '.join(twice)}", where=str(path), fix="keep one of them")
        return result

    try:
        raw = json.loads(text, object_pairs_hook=no_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"not valid JSON: {error.msg} (column {error.colno})",
            where=f"{path}:{error.lineno}",
            fix="JSON wants double quotes, no comments and no comma after the last entry; or use a .yaml file",
        ) from None
    if not isinstance(raw, dict):
        raise ConfigError("not a mapping of keys to values", where=str(path), fix='write {"key": value, ...}')
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        for found in re.finditer(r'"([^"\\]+)"\s*:', line):
            lines.setdefault(found.group(1), number)
    return raw, lines


def _parse_yaml(text: str, path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    import yaml

    try:
        raw = yaml.safe_load(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"not valid YAML: {reason}", where=str(path), fix="write one 'key: value' a line") from None
    if raw is None:
        return {}, {}
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise ConfigError("not a mapping of keys to values", where=str(path), fix="write one 'key: value' a line")
    lines: dict[str, int] = {}
    assert isinstance(root, yaml.MappingNode), root
    for key_node, _ in root.value:
        line = key_node.start_mark.line + 1
        if key_node.value in lines:
            raise ConfigError(f"'{key_node.value}' is given twice", where=f"{path}:{line}", fix="keep one of them")
        lines[key_node.value] = line
    return raw, lines
