"""Packed weights between runs: found again, and not after anything they follow from has changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from matrix.bench import Bench
from matrix.rows import ROWS
from oarsmith.compiling import BuildError
from oarsmith.native.library import load
from oarsmith.native.lower import lower
from oarsmith.native.store import PackedStore

try:
    load()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


def test_found_until_the_model_changes(tmp_path: Path) -> None:
    bench, store = Bench("llama", ROWS["llama"], tmp_path), PackedStore(tmp_path / "store")
    path = store.path(bench.path, "int8")
    assert store.read(path) is None
    program, arena = lower(bench.model(), "int8")
    assert store.write(path, program, arena)
    found = store.read(store.path(bench.path, "int8"))
    assert found is not None and found[0] == program
    assert store.path(bench.path, "int4") != path
    weights = bench.path / "model.safetensors"
    os.utime(weights, (1, 1))
    assert store.path(bench.path, "int8") != path


def test_a_damaged_file_goes(tmp_path: Path) -> None:
    bench, store = Bench("llama", ROWS["llama"], tmp_path), PackedStore(tmp_path / "store")
    path = store.path(bench.path, "fp32")
    assert store.write(path, *lower(bench.model(), "fp32"))
    path.write_bytes(path.read_bytes()[:-10])
    assert store.read(path) is None
    assert not path.exists()


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    bench, store = Bench("llama", ROWS["llama"], tmp_path), PackedStore(tmp_path / "file" / "store")
    assert not store.write(store.path(bench.path, "fp32"), *lower(bench.model(), "fp32"))


def test_the_oldest_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, store = Bench("llama", ROWS["llama"], tmp_path), PackedStore(tmp_path / "store")
    program, arena = lower(bench.model(), "int8")
    paths = [store.directory / f"{name}.packed" for name in "abc"]
    assert store.write(paths[0], program, arena)
    monkeypatch.setattr("oarsmith.native.store._MOST_BYTES", int(2.5 * paths[0].stat().st_size))
    for age, path in enumerate(paths[1:]):
        os.utime(paths[0], (age, age))
        assert store.write(path, program, arena)
    assert [path.exists() for path in paths] == [False, True, True]
