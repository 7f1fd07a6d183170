"""The one place that puts files on disk: complete under their final name, or not there at all.

Everything is written beside its destination under a name that starts with ``.tmp-``, synced, and renamed. A process
killed at any moment leaves either the old content or the new one under the final name, plus at most a temporary that
`remove_leftovers` recognises.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from oarsmith.errors import CheckpointError

TEMPORARY_PREFIX = ".tmp-"
_BACKUP_SUFFIX = ".old"
_OURS = re.compile(r"\.tmp-(?P<name>.+)\.[0-9a-f]{8}(?P<backup>\.old)?", re.DOTALL)


def _temporary_for(final: Path, suffix: str = "") -> Path:
    return final.with_name(f"{TEMPORARY_PREFIX}{final.name}.{secrets.token_hex(4)}{suffix}")


def _destination(path: Path) -> Path:
    """Follow links, so that the temporary lies on the disk the data will live on, and make the parent."""
    final = Path(os.path.realpath(path))
    final.parent.mkdir(parents=True, exist_ok=True)
    return final


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_full(final: Path, num_bytes: int | None) -> CheckpointError:
    free = shutil.disk_usage(final.parent).free
    needed = f"{num_bytes:,} bytes are needed and " if num_bytes is not None else ""
    return CheckpointError(
        f"the disk is full: {needed}{free:,} bytes are free; nothing that was there before has been touched",
        where=str(final),
        fix="free some space or save to another disk",
    )


@contextmanager
def _disk_errors(final: Path, num_bytes: int | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(final, num_bytes) from error
        raise


def require_space(path: Path, num_bytes: int) -> None:
    """Refuse before the first byte is written.

    Args:
        path: the file or directory about to be written; its parent must exist.
        num_bytes: how much will be written.

    Raises:
        CheckpointError: the disk has less than `num_bytes` free.
    """
    if shutil.disk_usage(path.parent).free < num_bytes:
        raise _disk_full(path, num_bytes)


@contextmanager
def atomic_file(path: Path, *, num_bytes: int | None = None) -> Iterator[BinaryIO]:
    """Yield a binary file that appears under `path` only when the block ends without an exception.

    Args:
        path: final name; an existing file is replaced in one step.
        num_bytes: size of what will be written, if known; checked against the free space first.

    Raises:
        CheckpointError: the disk is full.
    """
    final = _destination(path)
    if num_bytes is not None:
        require_space(final, num_bytes)
    temporary = _temporary_for(final)
    done = False
    try:
        with _disk_errors(final, num_bytes):
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(final)
            done = True
            _sync(final.parent)
    finally:
        if not done:
            temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` in one step: readers see the old content or the new one."""
    with atomic_file(path, num_bytes=len(data)) as file:
        file.write(data)


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` in one step."""
    atomic_write_bytes(path, text.encode("utf-8"))


def _sync_tree(root: Path) -> None:
    for directory, _, names in os.walk(root, topdown=False):
        for name in names:
            file = Path(directory, name)
            if not file.is_symlink():
                _sync(file)
        _sync(Path(directory))


def _put_in_place(temporary: Path, final: Path) -> None:
    """POSIX cannot rename over a non-empty directory: the old one steps aside, where `_restore_backups` finds it."""
    if not final.exists():
        temporary.rename(final)
        _sync(final.parent)
        return
    backup = _temporary_for(final, _BACKUP_SUFFIX)
    final.rename(backup)
    try:
        temporary.rename(final)
    except OSError:
        backup.rename(final)
        raise
    _sync(final.parent)
    # Half removed it must never be taken for a complete backup: it loses that name first.
    shutil.rmtree(backup.rename(_temporary_for(final)))


@contextmanager
def atomic_directory(final: Path, *, num_bytes: int | None = None) -> Iterator[Path]:
    """Yield a hidden sibling directory that becomes `final` when the block ends without an exception.

    On success every file is synced before the rename. On failure the temporary is removed and `final` is as it was.
    An existing `final` is replaced by two renames; a process killed between them leaves the old directory complete
    under a ``.tmp-`` name, and the next `atomic_directory` or `remove_leftovers` puts it back.

    Args:
        final: the directory to create or replace.
        num_bytes: size of what will be written, if known; checked against the free space first.

    Raises:
        CheckpointError: `final` is a file, or the disk is full.
    """
    final = _destination(final)
    if final.exists() and not final.is_dir():
        raise CheckpointError(
            "a file is in the way of the directory", where=str(final), fix="move it or choose another name"
        )
    _restore_backups(final.parent, final.name)
    if num_bytes is not None:
        require_space(final, num_bytes)
    temporary = _temporary_for(final)
    done = False
    try:
        with _disk_errors(final, num_bytes):
            temporary.mkdir()
            yield temporary
            _sync_tree(temporary)
            _put_in_place(temporary, final)
            done = True
    finally:
        if not done and temporary.exists():
            shutil.rmtree(temporary)


@contextmanager
def temporary_directory(final: Path) -> Iterator[Path]:
    """Yield a hidden directory beside `final`, on the same disk, which is removed when the block ends."""
    temporary = _temporary_for(_destination(final))
    temporary.mkdir()
    try:
        with _disk_errors(final, None):
            yield temporary
    finally:
        shutil.rmtree(temporary)


def _temporaries(parent: Path) -> list[tuple[Path, re.Match[str]]]:
    found = ((path, _OURS.fullmatch(path.name)) for path in sorted(parent.iterdir()))
    return [(path, match) for path, match in found if match is not None]


def _restore_backups(parent: Path, only: str | None = None) -> None:
    for path, match in _temporaries(parent):
        name = match["name"]
        if match["backup"] and only in (None, name) and not (parent / name).exists():
            path.rename(parent / name)


def remove_directory(path: Path) -> None:
    """Remove a directory that others may look at: it loses its name first, so no half of it is ever seen under it."""
    shutil.rmtree(path.rename(_temporary_for(path)))


def remove_leftovers(parent: Path) -> list[Path]:
    """Clean up after killed runs: remove the temporaries directly under `parent`.

    A directory that was being replaced at the moment of the kill is put back under its name instead. Call it only while
    nothing else writes into `parent`.

    Returns:
        What was removed.
    """
    if not parent.is_dir():
        return []
    _restore_backups(parent)
    removed = []
    for path, _ in _temporaries(parent):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        removed.append(path)
    return removed
