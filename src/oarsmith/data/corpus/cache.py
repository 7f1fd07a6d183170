"""Sample indices on disk: built once by one process, mapped by all.

Four files under one name, the md5 of a description of all that the index depends on (the documents' fingerprint among
it): ``<md5>.dsc`` with that description and the CRC-32 of the others, ``<md5>_doc_idx.npy``, ``<md5>_sample_idx.npy``
and ``<md5>_shuffle_idx.npy``. They are looked for in ``index-cache`` beside the corpus, then in `data_cache`, and
written to the first of these that can be written to. What is damaged is built again.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from oarsmith.atomic import TEMPORARY_PREFIX
from oarsmith.data.corpus.samples import SampleIndex
from oarsmith.data.corpus.stored import Array, map_bytes
from oarsmith.errors import DataError

FOLDER = "index-cache"
_ARRAYS = ("doc_idx", "sample_idx", "shuffle_idx")


@dataclass(frozen=True)
class Ranks:
    """Which process of a run this is: its number overall, its number on its machine, how many there are."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


@dataclass(frozen=True, kw_only=True)
class IndexCache:
    """Where indices are kept and who builds them.

    Attributes:
        data_cache: a second place, for corpora on a disk that cannot be written to.
        share_folder: all machines see the same folders: rank 0 alone builds, else local rank 0 of each machine.
        timeout: seconds the others wait for an index.
    """

    data_cache: Path | None = None
    share_folder: bool = False
    ranks: Ranks = Ranks()
    timeout: float = 1800.0

    def index(
        self, prefix: Path, description: str, build: Callable[[], SampleIndex], *, wait: bool = True
    ) -> tuple[SampleIndex, str]:
        """The index and a note on it ("" where there is nothing to say).

        Args:
            prefix: of the corpus; ``index-cache`` lies beside it.
            description: lines that say all that the index depends on.
            build: makes it. Every process must get the same from it.
            wait: processes that do not save an index wait for the one that does; False: they build it for themselves.

        Raises:
            DataError: the process that builds it could not save it, or has not done so in time.
        """
        name = hashlib.md5(description.encode(), usedforsecurity=False).hexdigest()
        folders = [prefix.parent / FOLDER, *([self.data_cache] if self.data_cache is not None else [])]
        found, note = _load_any(folders, name, description)
        if found is not None:
            return found, ""
        target = next((folder for folder in folders if _writable(folder)), None)
        if target is None:
            where = " and ".join(map(str, folders))
            kept = f"the index of {prefix} is kept in memory: {where} cannot be written to (data_cache names a folder)"
            return build(), "; ".join([*([note] if note else []), kept])
        if (self.ranks.rank if self.share_folder else self.ranks.local_rank) != 0:
            return (self._wait(folders, name, description) if wait else build()), ""
        built = build()
        try:
            _save(target, name, description, built)
        except OSError as error:
            problem = f"the index of {prefix} could not be saved in {target} ({error.strerror or error})"
            if wait and self.ranks.world_size > 1:
                fix = "free some space, or set data_cache to a folder that the processes can write to"
                raise DataError(f"{problem}; other processes wait for it", where=str(target), fix=fix) from error
            return built, "; ".join([*([note] if note else []), f"{problem}; it is kept in memory"])
        mapped, _ = _load_any([target], name, description)
        return mapped or built, note

    def _wait(self, folders: list[Path], name: str, description: str) -> SampleIndex:
        until, pause = time.monotonic() + self.timeout, 0.01
        while True:
            found, _ = _load_any(folders, name, description)
            if found is not None:
                return found
            if time.monotonic() > until:
                break
            time.sleep(pause)
            pause = min(1.5 * pause, 3.0)
        builder = "rank 0" if self.share_folder else "local rank 0 of this machine"
        what = f"{builder} has not written the index within {self.timeout:g} seconds"
        if self.share_folder:
            fix = "see rank 0's output; if the machines do not share this folder, set share_folder to false"
        else:
            fix = "see that process's output; it must have the same paths as this one"
        raise DataError(what, where=str(folders[0] / f"{name}.dsc"), fix=fix)


def _load_any(folders: list[Path], name: str, description: str) -> tuple[SampleIndex | None, str]:
    """The first index that is whole, and what is wrong with those that are not."""
    problems = []
    for folder in folders:
        try:
            return _load(folder, name, description), ""
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            problems.append(f"{folder / name}.dsc: the saved index cannot be used and is built again ({error})")
    return None, "; ".join(problems)


def _load(folder: Path, name: str, description: str) -> SampleIndex:
    text = (folder / f"{name}.dsc").read_text(encoding="utf-8")
    begin = _first_lines(description)
    if not text.startswith(begin):
        raise ValueError("it describes another index")
    sums = text[len(begin) :].split()
    if len(sums) != len(_ARRAYS):
        raise ValueError("it ends early")
    return SampleIndex(
        *(_load_array(_array_path(folder, name, kind), crc) for kind, crc in zip(_ARRAYS, sums, strict=True))
    )


def _load_array(path: Path, crc: str) -> Array:
    if not path.exists():
        raise ValueError(f"{path.name} is missing")
    if _crc(path) != crc:
        raise ValueError(f"{path.name} is damaged")
    return np.lib.format.open_memmap(path, mode="r").view(np.ndarray)


def _save(folder: Path, name: str, description: str, index: SampleIndex) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sums = []
    for kind, values in zip(_ARRAYS, (index.doc_idx, index.sample_idx, index.shuffle_idx), strict=True):
        path = _array_path(folder, name, kind)
        temporary = _temporary(path)
        try:
            with temporary.open("xb") as file:
                np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
                file.write(values.data)
            sums.append(_crc(temporary))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    temporary = _temporary(folder / f"{name}.dsc")
    try:
        temporary.write_text(_first_lines(description) + "\n".join(sums) + "\n", encoding="utf-8")
        temporary.replace(folder / f"{name}.dsc")
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """Not `atomic_file`, which waits for the disk: a blend has hundreds of these files, and their sums tell."""
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}.{secrets.token_hex(4)}")


def _array_path(folder: Path, name: str, kind: str) -> Path:
    return folder / f"{name}_{kind}.npy"


def _first_lines(description: str) -> str:
    return description + "\nCRC-32 of " + ", ".join(_ARRAYS) + ":\n"


def _crc(path: Path) -> str:
    return f"{zlib.crc32(map_bytes(path).data):08x}"


def _writable(folder: Path) -> bool:
    """Whether files can be made in it, or it can be made."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
