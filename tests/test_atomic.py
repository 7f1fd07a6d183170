from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oarsmith.atomic import (
    TEMPORARY_PREFIX,
    atomic_directory,
    atomic_file,
    atomic_write_bytes,
    atomic_write_text,
    remove_leftovers,
    require_space,
    temporary_directory,
)
from oarsmith.errors import CheckpointError


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    atomic_write_text(path, "Ünicode")
    atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["x.json"]


def test_a_failed_file_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_file(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "x", "")
    with atomic_directory(tmp_path / "d"):
        pass
    (tmp_path / "plain").touch()
    (tmp_path / "plain_d").mkdir()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "d").stat().st_mode == (tmp_path / "plain_d").stat().st_mode


def test_directory_appears_at_the_end(tmp_path: Path) -> None:
    final = tmp_path / "out"
    with atomic_directory(final) as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "a").write_text("1")
        assert directory.parent == tmp_path
        assert not final.exists()
    assert (final / "sub" / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]


def test_directory_is_replaced_or_kept(tmp_path: Path) -> None:
    final = tmp_path / "out"
    final.mkdir()
    (final / "old").write_text("old")
    with pytest.raises(KeyError), atomic_directory(final) as directory:
        (directory / "new").write_text("half")
        raise KeyError
    assert os.listdir(final) == ["old"]
    with atomic_directory(final) as directory:
        (directory / "new").write_text("new")
    assert os.listdir(final) == ["new"]
    assert os.listdir(tmp_path) == ["out"]


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    with atomic_directory(tmp_path / "out") as directory:
        (directory / "a").write_text("1")
        assert directory.parent == tmp_path / "disk"
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "real" / "a").read_text() == "1"


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(CheckpointError, match="a file is in the way"), atomic_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "out").read_text() == "precious"


def test_disk_full_before_writing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"1,000,000,000,000,000,000 bytes are needed and [\d,]+ bytes are free"):
        require_space(tmp_path / "x", 10**18)
    with pytest.raises(CheckpointError, match="disk is full"), atomic_directory(tmp_path / "out", num_bytes=10**18):
        pass
    with pytest.raises(CheckpointError, match="disk is full"), atomic_file(tmp_path / "x", num_bytes=10**18):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is the kernel's own full disk; Linux only")
def test_disk_full_while_writing(tmp_path: Path) -> None:
    final = tmp_path / "out"
    final.mkdir()
    (final / "old").write_text("old")
    message = "nothing that was there before has been touched"
    with pytest.raises(CheckpointError, match=message) as caught, atomic_directory(final) as directory:
        (directory / "a").write_text("1")
        Path("/dev/full").write_bytes(b"x")
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(final) == ["old"]


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".tmp-out.0123abcd").mkdir()
    (tmp_path / ".tmp-out.0123abcd" / "half").write_text("")
    (tmp_path / ".tmp-x.json.89abcdef").write_text("half")
    for name in (".tmp-notes", "keep", ".hidden"):
        (tmp_path / name).write_text("")
    removed = remove_leftovers(tmp_path)
    assert [path.name for path in removed] == [".tmp-out.0123abcd", ".tmp-x.json.89abcdef"]
    assert sorted(os.listdir(tmp_path)) == [".hidden", ".tmp-notes", "keep"]
    assert remove_leftovers(tmp_path / "absent") == []


def test_a_replacement_killed_half_way_is_undone(tmp_path: Path) -> None:
    """Between the two renames the old directory has only its backup name; both ways back restore it."""
    for restore in ("leftovers", "next write"):
        backup = tmp_path / ".tmp-out.0123abcd.old"
        backup.mkdir()
        (backup / "old").write_text("old")
        if restore == "leftovers":
            assert remove_leftovers(tmp_path) == []
        else:
            with pytest.raises(KeyError), atomic_directory(tmp_path / "out"):
                raise KeyError
        assert os.listdir(tmp_path) == ["out"]
        assert os.listdir(tmp_path / "out") == ["old"]
        shutil.rmtree(tmp_path / "out")


_WRITER = """
import sys
from pathlib import Path
from oarsmith.atomic import atomic_directory
final = Path(sys.argv[1])
for round in range(10**9):
    with atomic_directory(final) as directory:
        for index in range(5):
            (directory / str(index)).write_text(str(round) * 1000)
"""


def test_a_killed_process_leaves_a_complete_directory(tmp_path: Path) -> None:
    final = tmp_path / "out"
    for kill in range(8):
        process = subprocess.Popen([sys.executable, "-c", _WRITER, str(final)])
        deadline = time.monotonic() + 30
        while not final.exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.003 * kill)
        process.send_signal(signal.SIGKILL)
        process.wait()
        remove_leftovers(tmp_path)
        assert os.listdir(tmp_path) == ["out"]
        contents = [(final / str(index)).read_text() for index in range(5)]
        assert len(set(contents)) == 1
        assert contents[0]


def test_a_temporary_directory_is_beside_and_goes_away(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), temporary_directory(tmp_path / "model") as folder:
        assert folder.parent == tmp_path and folder.name.startswith(TEMPORARY_PREFIX)
        (folder / "big").write_bytes(b"x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with temporary_directory(tmp_path / "new" / "model") as folder:
        assert remove_leftovers(folder.parent) == [folder]
        folder.mkdir()
