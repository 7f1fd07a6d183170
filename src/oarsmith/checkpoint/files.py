"""Files of a checkpoint directory that cannot be trusted: JSON, shard indexes, links. No PyTorch here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from oarsmith.errors import CheckpointError

MAX_JSON_BYTES = 100_000_000
REFETCH = "copy or download the file again"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`json.loads` hook: a key that comes twice means something else to every reader."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:100]!r} occurs twice")
    return found


def parse_json_object(text: bytes, where: str) -> dict[str, Any]:
    """One JSON object without duplicate keys.

    Raises:
        CheckpointError: anything else.
    """
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not valid JSON: {error}", where=where, fix=REFETCH) from error
    if not isinstance(value, dict):
        raise CheckpointError("must hold one JSON object", where=where, fix=REFETCH)
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """`parse_json_object` of a file of sane size."""
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{size:,} bytes of JSON; at most {MAX_JSON_BYTES:,} are read", where=str(path), fix=REFETCH
        )
    return parse_json_object(path.read_bytes(), str(path))


def require_inside(directory: Path, path: Path) -> Path:
    """Refuse a link that leads out of the directory; a hub cache's own blobs are the one exception.

    Raises:
        CheckpointError: the link leads elsewhere.
    """
    home, real = os.path.realpath(directory), os.path.realpath(path)
    allowed = [home]
    if Path(home).parent.name == "snapshots":  # models--org--name/snapshots/HASH/file -> ../../blobs/HASH
        allowed.append(str(Path(home).parents[1] / "blobs"))
    if not any(real.startswith(folder.rstrip("/") + "/") for folder in allowed):
        raise CheckpointError(
            f"is a link that leads out of the directory, to {real}",
            where=str(path),
            fix="replace the link by a copy of the file it names, if you trust it",
        )
    return path


def read_shards(index: Path) -> dict[str, list[str]]:
    """Shard file -> names of its tensors, from an index. Every file is there, in the index's own directory.

    Raises:
        CheckpointError: not an index, a shard outside of the directory, missing shards.
    """
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError("damaged index: no weight_map that names files", where=str(index), fix=REFETCH)
    shards: dict[str, list[str]] = {}
    for tensor, file in names.items():
        if not isinstance(file, str) or Path(file).name != file or "\0" in file:
            raise CheckpointError(f"the index points outside the directory: {file!r}", where=str(index))
        shards.setdefault(file, []).append(tensor)
    missing = sorted(file for file in shards if not (index.parent / file).exists())
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(shards)} shards are missing: {', '.join(missing[:4])}",
            where=str(index.parent),
            fix="copy the missing files beside the index",
        )
    return dict(sorted(shards.items()))


def check_shard(index: Path, path: Path, promised: list[str], present: set[str], taken: set[str]) -> None:
    """A shard holds what the index says, and nothing that another shard has held already.

    Raises:
        CheckpointError: a promised tensor is missing, or a tensor lies in two shards.
    """
    absent = sorted(set(promised) - present)
    if absent:
        raise CheckpointError(
            f"{index.name} says that {absent[0]} lies here, but it does not", where=str(path), fix=REFETCH
        )
    twice = sorted(present & taken)
    if twice:
        raise CheckpointError(f"tensor {twice[0]} lies in two shards", where=str(path), fix=REFETCH)
