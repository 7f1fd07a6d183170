"""Finding the files of a split, and datasets that the `datasets` library reads."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from oarsmith.errors import DataError

# PaddleNLP says dev, the hub says validation; one split under several names.
_SPLIT_NAMES = {
    "train": ("train",),
    "dev": ("dev", "validation", "valid", "val", "eval"),
    "test": ("test",),
}
_SUFFIXES = ("jsonl", "json", "csv", "parquet")
_SAVED_MARKERS = ("dataset_dict.json", "dataset_info.json", "state.json")


def find_split(folder: str | Path, split: str) -> list[Path]:
    """The files of one split of a folder, sorted.

    Looked for in this order, the first that exists is taken: `train.json`, `train/*.json`, `train-*.json`
    (hub shards), and the same under `data/`; each also as jsonl, csv and parquet. "dev" also goes by validation,
    valid, val and eval.

    Raises:
        DataError: the folder has no such split; the message lists what it has.
    """
    root = Path(folder)
    for name in _SPLIT_NAMES.get(split, (split,)):
        for base in (root, root / "data"):
            for pattern in (f"{name}.{{}}", f"{name}/*.{{}}", f"{name}-*.{{}}"):
                files = sorted(file for suffix in _SUFFIXES for file in base.glob(pattern.format(suffix)))
                if files:
                    return files
    raise DataError(
        f"the folder has no split '{split}'; it has {_listing(root)}",
        where=str(root),
        fix=f"name a file {split}.json (or a folder {split}/ of such files), or give the path of one file",
    )


def has_split(folder: str | Path, split: str) -> bool:
    """Whether `find_split` finds files of the split in the folder."""
    try:
        return bool(find_split(folder, split))
    except DataError:
        return False


def is_saved_dataset(folder: Path) -> bool:
    """Whether the folder was written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return any((folder / name).is_file() for name in _SAVED_MARKERS)


def missing_file(path: Path) -> DataError:
    """The error for a path that is not there, naming what is near it."""
    parent = path.parent
    if not parent.is_dir():
        existing = next(folder for folder in (*parent.parents, Path(".")) if folder.is_dir())
        what = f"no such folder: {parent}; the nearest that exists is {existing}"
        return DataError(what, where=str(path), fix="check the path")
    near = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=3)
    meant = f"did you mean {' or '.join(repr(name) for name in near)}?" if near else "check the path"
    return DataError(f"no such file; {parent} has {_listing(parent)}", where=str(path), fix=meant)


def read_datasets(source: str, split: str) -> Iterator[dict[str, Any]]:
    """Rows of a dataset saved to disk or of a hub name, through the `datasets` library."""
    import datasets

    try:
        if Path(source).is_dir():
            loaded = datasets.load_from_disk(source)
        else:
            loaded = datasets.load_dataset(source)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        what = f"'{source}' is no file or folder here, and as a dataset name it does not load: {error}"
        fix = "check the path or the name; without a network a hub dataset must be in the cache already"
        raise DataError(what, where=source, fix=fix) from error
    if not isinstance(loaded, datasets.DatasetDict):
        yield from loaded
        return
    for name in _SPLIT_NAMES.get(split, (split,)):
        if name in loaded:
            yield from loaded[name]
            return
    raise DataError(
        f"the dataset has no split '{split}'; it has {', '.join(loaded)}", where=source, fix="name another split"
    )


def _listing(folder: Path, limit: int = 8) -> str:
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    if not names:
        return "nothing in it"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def read_text_file(path: str | Path) -> str:
    """A text file as a whole.

    Raises:
        DataError: there is none, or it is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise missing_file(Path(path)) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"the file is not UTF-8 (byte {error.start})", where=str(path), fix="save it as UTF-8"
        ) from error
