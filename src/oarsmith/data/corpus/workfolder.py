"""The hidden folder beside the output in which shards are kept until all are there: what a killed job goes on from."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oarsmith.atomic import atomic_write_text, remove_directory, remove_leftovers
from oarsmith.errors import OarsmithError

_PLAN = "plan.json"
_LOCK = "lock"


@dataclass(frozen=True)
class WorkFolder:
    """A work folder that this process holds.

    Attributes:
        path: the folder.
        note: what became of an earlier, unfinished job, or None where there was none.
        continues: whether its shards can be used.
    """

    path: Path
    note: str | None
    continues: bool


def work_path(prefix: Path) -> Path:
    """Where the shards of an output lie while it is made."""
    return prefix.with_name(f".{prefix.name}.shards")


def is_interrupted(prefix: Path, plan: Mapping[str, Any]) -> bool:
    """Whether an earlier job with the same plan has left its shards."""
    return _read_plan(work_path(prefix)) == _plain(plan)


@contextmanager
def work_folder(prefix: Path, plan: Mapping[str, Any]) -> Iterator[WorkFolder]:
    """Open the work folder of an output and hold it; it stays when the block fails and goes when it succeeds.

    Args:
        prefix: of the output.
        plan: all that decides the shards (plain JSON values). Shards of another plan are removed.

    Raises:
        OarsmithError: another process is making this output.
    """
    folder = work_path(prefix)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OarsmithError(
                "another process is making this output", where=str(prefix), fix="wait for it, or name another output"
            ) from None
        before = _read_plan(folder)
        continues = before == _plain(plan)
        note = None
        if before is not None and not continues:
            _clear(folder)
            note = f"the shards of an unfinished job are removed: it had {_difference(before, _plain(plan))}"
        remove_leftovers(folder)
        if not continues:
            atomic_write_text(folder / _PLAN, json.dumps(plan, indent=1, ensure_ascii=False))
        yield WorkFolder(folder, note, continues)
        remove_directory(folder)


def _read_plan(folder: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((folder / _PLAN).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found


def _plain(plan: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a file."""
    plain: dict[str, Any] = json.loads(json.dumps(plan))
    return plain


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    other = [key for key in {**now, **before} if before.get(key) != now.get(key)]
    shown = [f"{key} {before.get(key)!r}" if len(repr(before.get(key))) < 60 else f"another {key}" for key in other]
    return ", ".join(shown)


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name == _LOCK:
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
