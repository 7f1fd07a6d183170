"""A program and its arena in a file: what was packed once is read as it is, without the model and without PyTorch.

The file is a cache of this program's own, not a format to pass on: another version does not read it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from oarsmith.atomic import atomic_file
from oarsmith.errors import CheckpointError
from oarsmith.models.cache_form import CacheForm
from oarsmith.models.caching import CacheRules
from oarsmith.models.facts import ModelFacts
from oarsmith.models.spec import PrefixLM, ResetAfter
from oarsmith.native import program as parts
from oarsmith.native.arena import Arena
from oarsmith.native.program import Program

_MAGIC = b"OARPACK1"
# The arena begins at a page, so that it can be read straight into one.
_ALIGNMENT = 4096
_CLASSES = {
    cls.__name__: cls
    for cls in (
        parts.Vector,
        parts.Matrix,
        parts.Norm,
        parts.Turn,
        parts.Attention,
        parts.Experts,
        parts.Operation,
        parts.Rotation,
        parts.Program,
        ModelFacts,
        CacheForm,
        CacheRules,
        PrefixLM,
        ResetAfter,
    )
}


def write_packed(path: Path, program: Program, arena: Arena) -> None:
    """Write both, whole under the name or not at all.

    Raises:
        CheckpointError: the disk is full.
    """
    header = json.dumps(_encode(program), separators=(",", ":")).encode()
    start = _MAGIC + len(header).to_bytes(8, "little") + _digest(header) + header
    start += bytes(-len(start) % _ALIGNMENT)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, num_bytes=len(start) + arena.size) as file:
        file.write(start)
        file.write(memoryview(arena.memory)[: arena.size])


def read_packed(path: Path) -> tuple[Program, Arena]:
    """Both from a file.

    Raises:
        CheckpointError: the file is damaged or of another version.
    """
    with path.open("rb", buffering=0) as file:
        start = file.read(48)
        length = int.from_bytes(start[8:16], "little")
        header = file.read(length) if start[:8] == _MAGIC and length < path.stat().st_size else b""
        if not header or _digest(header) != start[16:48]:
            raise _damaged(path)
        program = _decode(json.loads(header))
        assert isinstance(program, Program), program
        offset = -(-(48 + length) // _ALIGNMENT) * _ALIGNMENT
        if path.stat().st_size != offset + program.arena_bytes:
            raise _damaged(path)
        arena = Arena(program.arena_bytes)
        file.seek(offset)
        view, at = memoryview(arena.memory), 0
        while at < arena.size:
            at += file.readinto(view[at : arena.size]) or _stop(path)
    return program, arena


def _stop(path: Path) -> int:
    raise _damaged(path)


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(
        "the packed weights are damaged or of another version", where=str(path), fix="delete the file"
    )


def _digest(header: bytes) -> bytes:
    return hashlib.blake2b(header, digest_size=32).digest()


def _encode(value: Any) -> Any:
    """Dataclasses as objects with the name of their class; fields that have their default are left out."""
    if is_dataclass(value):
        own = {field.name: getattr(value, field.name) for field in fields(value)}
        kept = {name: _encode(v) for name, v in own.items() if not _is_default(value, name, v)}
        return {"": type(value).__name__, **kept}
    return [_encode(item) for item in value] if isinstance(value, tuple) else value


def _is_default(value: Any, name: str, own: Any) -> bool:
    field = value.__dataclass_fields__[name]
    return type(own) is type(field.default) and own == field.default


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return _CLASSES[value.pop("")](**{name: _decode(v) for name, v in value.items()})
    return tuple(_decode(item) for item in value) if isinstance(value, list) else value
