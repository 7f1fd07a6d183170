"""An index is built once, by one process, and never used when it is not whole."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest

from oarsmith.data.corpus.cache import IndexCache, Ranks
from oarsmith.data.corpus.samples import build_index
from oarsmith.errors import DataError

DESCRIPTION = "GPT Dataset\nseed: 1\nlängd: 4"
NAME = hashlib.md5(DESCRIPTION.encode()).hexdigest()
FILES = [f"{NAME}.dsc", f"{NAME}_doc_idx.npy", f"{NAME}_sample_idx.npy", f"{NAME}_shuffle_idx.npy"]


class Build:
    """Builds, and counts how often."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self):
        self.count += 1
        lengths = np.arange(40, dtype=np.int32)
        return build_index(lengths, range(40), seq_len=4, num_epochs=2, seed=1, purpose="p")


def arrays(index):
    return [values.tolist() for values in (index.doc_idx, index.sample_idx, index.shuffle_idx)]


WANTED = arrays(Build()())


def open_index(prefix: Path, cache: IndexCache | None = None, description=DESCRIPTION):
    """(times built, note), of an index that is the right one."""
    build = Build()
    index, note = (cache or IndexCache()).index(prefix, description, build)
    assert arrays(index) == WANTED
    return build.count, note


def test_built_once_then_read(tmp_path):
    assert open_index(tmp_path / "c") == (1, "")
    assert sorted(path.name for path in (tmp_path / "index-cache").iterdir()) == sorted(FILES)
    assert (tmp_path / "index-cache" / FILES[0]).read_text(encoding="utf-8").startswith(DESCRIPTION)
    assert open_index(tmp_path / "c") == (0, "")
    assert open_index(tmp_path / "c", description="another") == (1, "")


def test_what_is_read_is_mapped_and_cannot_be_changed(tmp_path):
    open_index(tmp_path / "c")
    index, _ = IndexCache().index(tmp_path / "c", DESCRIPTION, Build())
    assert (
        not index.doc_idx.flags.writeable and index.doc_idx.dtype == np.int32 and index.shuffle_idx.dtype == np.uint32
    )


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[:-1])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "bit":
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    elif how == "header":
        path.write_bytes(b"\x00" + content[1:])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["cut", "empty", "bit", "header", "gone"])
@pytest.mark.parametrize("which", range(4))
def test_a_damaged_index_is_built_again(tmp_path, which, how):
    open_index(tmp_path / "c")
    damage(tmp_path / "index-cache" / FILES[which], how)
    if (which, how) == (0, "cut"):  # the last line end: nothing is lost
        assert open_index(tmp_path / "c") == (0, "")
        return
    built, note = open_index(tmp_path / "c")
    assert built == 1
    assert (which, how) == (0, "gone") or "cannot be used and is built again" in note
    assert which == 0 or FILES[which] in note
    assert open_index(tmp_path / "c") == (0, "")


def test_a_description_of_something_else_is_stale(tmp_path):
    open_index(tmp_path / "c")
    path = tmp_path / "index-cache" / FILES[0]
    path.write_text(path.read_text(encoding="utf-8").replace("seed: 1", "seed: 2"), encoding="utf-8")
    built, note = open_index(tmp_path / "c")
    assert built == 1 and "it describes another index" in note


def test_a_corpus_folder_that_cannot_be_written_to(tmp_path):
    """A file in the way of the folder: a mode would not stop root, who may run this."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "index-cache").touch()
    prefix = tmp_path / "data" / "c"
    second = IndexCache(data_cache=tmp_path / "elsewhere" / "deep")
    assert open_index(prefix, second) == (1, "")
    assert sorted(path.name for path in (tmp_path / "elsewhere" / "deep").iterdir()) == sorted(FILES)
    assert open_index(prefix, second) == (0, "")
    built, note = open_index(prefix)
    assert built == 1 and "kept in memory" in note and "index-cache" in note


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data").chmod(0o500)
    built, note = open_index(tmp_path / "data" / "c")
    assert built == 1 and "kept in memory" in note


def test_both_places_are_looked_into(tmp_path):
    cache = IndexCache(data_cache=tmp_path / "cache")
    (tmp_path / "a").mkdir()
    open_index(tmp_path / "a" / "c")
    (tmp_path / "a" / "index-cache").rename(tmp_path / "cache")
    assert open_index(tmp_path / "a" / "c", cache) == (0, "")
    assert not (tmp_path / "a" / "index-cache").exists()


@pytest.mark.parametrize(("world_size", "outcome"), [(1, "it is kept in memory"), (2, "other processes wait for it")])
def test_a_disk_that_is_full(tmp_path, world_size, outcome):
    """The kernel's limit on the size of files stands for the disk."""
    script = f"""
    import resource, pathlib, numpy as np
    from oarsmith.data.corpus.cache import IndexCache, Ranks
    from oarsmith.data.corpus.samples import build_index
    def build():
        lengths = np.full(2000, 9, dtype=np.int32)
        return build_index(lengths, range(2000), seq_len=4, num_epochs=1, seed=1, purpose="p")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    cache = IndexCache(ranks=Ranks(0, 0, {world_size}))
    print(cache.index(pathlib.Path({str(tmp_path / "c")!r}), "d", build)[1])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (world_size == 1)
    assert outcome in done.stdout + done.stderr and "File too large" in done.stdout + done.stderr
    assert list((tmp_path / "index-cache").iterdir()) == []


def waits(prefix: Path, cache: IndexCache) -> tuple[threading.Thread, list[tuple[int, str]]]:
    found: list[tuple[int, str]] = []
    thread = threading.Thread(target=lambda: found.append(open_index(prefix, cache)))
    thread.start()
    return thread, found


@pytest.mark.parametrize(
    ("share_folder", "builder", "waiting"),
    [(False, Ranks(2, 0, 4), Ranks(3, 1, 4)), (True, Ranks(0, 0, 4), Ranks(2, 0, 4))],
)
def test_one_process_builds_and_the_others_wait(tmp_path, share_folder, builder, waiting):
    thread, found = waits(tmp_path / "c", IndexCache(share_folder=share_folder, ranks=waiting, timeout=60))
    thread.join(0.2)
    assert thread.is_alive()
    assert open_index(tmp_path / "c", IndexCache(share_folder=share_folder, ranks=builder)) == (1, "")
    thread.join(30)
    assert found == [(0, "")]


def test_who_waits_does_not_take_a_damaged_index(tmp_path):
    open_index(tmp_path / "c")
    damage(tmp_path / "index-cache" / FILES[2], "bit")
    thread, found = waits(tmp_path / "c", IndexCache(ranks=Ranks(1, 1, 2), timeout=60))
    thread.join(0.2)
    assert thread.is_alive()
    assert open_index(tmp_path / "c")[0] == 1
    thread.join(30)
    assert found == [(0, "")]


def test_each_machine_builds_its_own_where_folders_are_not_shared(tmp_path):
    for machine in range(2):
        (tmp_path / str(machine)).mkdir()
        prefix = tmp_path / str(machine) / "c"
        assert open_index(prefix, IndexCache(ranks=Ranks(2 * machine, 0, 4))) == (1, "")
        assert open_index(prefix, IndexCache(ranks=Ranks(2 * machine + 1, 1, 4))) == (0, "")
    first, second = ((tmp_path / str(machine) / "index-cache") for machine in range(2))
    assert [(first / name).read_bytes() for name in FILES] == [(second / name).read_bytes() for name in FILES]


@pytest.mark.parametrize(("share_folder", "who"), [(True, "rank 0 "), (False, "local rank 0 of this machine")])
def test_waiting_ends(tmp_path, share_folder, who):
    cache = IndexCache(share_folder=share_folder, ranks=Ranks(3, 1, 4), timeout=0.05)
    with pytest.raises(DataError, match=f"{who}.*within 0.05 seconds") as caught:
        open_index(tmp_path / "c", cache)
    assert ("share_folder" in caught.value.fix) == share_folder


def test_who_would_wait_in_vain_builds_in_memory(tmp_path):
    (tmp_path / "index-cache").touch()
    built, note = open_index(tmp_path / "c", IndexCache(ranks=Ranks(3, 1, 4), timeout=0.05))
    assert built == 1 and "kept in memory" in note
