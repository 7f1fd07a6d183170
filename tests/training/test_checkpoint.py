"""The checkpoint store: whole or invisible, pruned from the old end, checked when read."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from oarsmith.atomic import atomic_write_text
from oarsmith.errors import CheckpointError
from oarsmith.training.checkpoint import CheckpointStore, read_checkpoint

OPTIMIZER = {"w/exp_avg": torch.arange(6.0).view(2, 3), "w/low": torch.arange(4, dtype=torch.int16)}


def write_model(folder: Path) -> None:
    atomic_write_text(folder / "config.json", "{}")


def save(store, step, **state):
    return store.save(step, write_model, OPTIMIZER, {"step": step, **state})


def test_round_trip(tmp_path):
    path = save(CheckpointStore(tmp_path, keep=None), 12, loader={"epoch": 1})
    tensors, state = read_checkpoint(path)
    assert path == tmp_path / "checkpoint-12"
    assert state == {"step": 12, "loader": {"epoch": 1}}
    assert tensors.keys() == OPTIMIZER.keys()
    for name, tensor in OPTIMIZER.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_the_manifest_names_every_file(tmp_path):
    path = save(CheckpointStore(tmp_path, keep=None), 1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest) == {"config.json", "trainer/optimizer.safetensors", "trainer/state.json"}
    assert all(len(entry["sha256"]) == 64 and entry["bytes"] > 0 for entry in manifest.values())


def test_latest_is_the_highest_step_and_cleans_up(tmp_path):
    store = CheckpointStore(tmp_path, keep=None)
    for step in (5, 100, 20):
        save(store, step)
    (tmp_path / ".tmp-checkpoint-120.0123abcd").mkdir()
    (tmp_path / ".tmp-checkpoint-120.0123abcd" / "half").write_text("x")
    (tmp_path / "checkpoint-999").mkdir()  # not ours: no manifest
    (tmp_path / "checkpoint-best").mkdir()
    assert store.latest() == tmp_path / "checkpoint-100"
    assert not list(tmp_path.glob(".tmp-*"))
    assert (tmp_path / "checkpoint-999").exists()


def test_no_checkpoint(tmp_path):
    assert CheckpointStore(tmp_path / "none", keep=1).latest() is None


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(None, None, [1, 2, 3, 4]), (1, None, [4]), (2, None, [3, 4]), (1, 2, [2, 4]), (2, 2, [2, 4]), (3, 1, [1, 3, 4])],
)
def test_prune(tmp_path, keep, best, left):
    store = CheckpointStore(tmp_path, keep=keep)
    for step in (1, 2, 3, 4):
        save(store, step)
    store.prune(best)
    assert store.steps() == left
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in left]


def test_saving_again_replaces(tmp_path):
    store = CheckpointStore(tmp_path, keep=None)
    save(store, 3, mark="first")
    save(store, 3, mark="second")
    assert read_checkpoint(tmp_path / "checkpoint-3")[1]["mark"] == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_failing_save_leaves_nothing(tmp_path):
    store = CheckpointStore(tmp_path, keep=None)
    save(store, 1)

    def fail(folder: Path) -> None:
        write_model(folder)
        raise RuntimeError("while writing")

    with pytest.raises(RuntimeError, match="while writing"):
        store.save(2, fail, OPTIMIZER, {})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    "name", ["config.json", "trainer/optimizer.safetensors", "trainer/state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["missing", "shorter", "other"])
def test_damage_is_named(tmp_path, name, damage):
    path = save(CheckpointStore(tmp_path, keep=None), 1)
    file = path / name
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(data[:-2] if damage == "shorter" else bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert name in str(caught.value) or "no complete checkpoint" in str(caught.value)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    done = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not done or done.returncode != 0:
        pytest.skip("mounting a small disk is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_full_while_saving(small_disk):
    store = CheckpointStore(small_disk / "run", keep=None)
    save(store, 1)
    big = {"w/exp_avg": torch.zeros(100_000)}
    with pytest.raises(CheckpointError, match="the disk is full") as caught:
        store.save(2, write_model, big, {})
    assert "nothing that was there before has been touched" in str(caught.value)
    assert [path.name for path in (small_disk / "run").iterdir()] == ["checkpoint-1"]
    assert read_checkpoint(store.path(1))[1] == {"step": 1}
