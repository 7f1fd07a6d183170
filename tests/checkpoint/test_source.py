"""The tensors of a directory: one file or shards, checked before they are trusted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from oarsmith.checkpoint.source import INDEX, SINGLE, TensorSource
from oarsmith.errors import CheckpointError

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.arange(4).to(torch.bfloat16),
    "c.d": torch.zeros(0, 5),
    "e": torch.tensor(7),
}


def single(folder: Path) -> Path:
    save_file(TENSORS, folder / SINGLE)
    return folder


def sharded(folder: Path) -> Path:
    files = {"a": "x.safetensors", "b": "y.safetensors", "c.d": "y.safetensors", "e": "y.safetensors"}
    for file in set(files.values()):
        save_file({name: TENSORS[name] for name in files if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


@pytest.mark.parametrize("write", [single, sharded])
def test_reading(write: Callable[[Path], Path], tmp_path: Path) -> None:
    with TensorSource(write(tmp_path)) as source:
        assert source.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
        assert source.dtypes == {"a": "F32", "b": "BF16", "c.d": "F32", "e": "I64"}
        for name in ("e", "a", "c.d", "b", "a"):  # any order, also twice
            found = source.read(name)
            assert torch.equal(found, TENSORS[name]) and found.dtype == TENSORS[name].dtype


def test_a_tensor_outlives_the_source(tmp_path: Path) -> None:
    with TensorSource(single(tmp_path)) as source:
        found = source.read("a")
    (tmp_path / SINGLE).write_bytes(b"")
    assert torch.equal(found, TENSORS["a"])


def test_a_file_that_shrinks_meanwhile(tmp_path: Path) -> None:
    with TensorSource(single(tmp_path)) as source:
        os.truncate(tmp_path / SINGLE, (tmp_path / SINGLE).stat().st_size - 12)
        with pytest.raises(CheckpointError, match="the file ends early"):
            for name in TENSORS:
                source.read(name)


def test_a_dtype_that_torch_does_not_have(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + b"xx")
    with TensorSource(tmp_path) as source, pytest.raises(CheckpointError, match="dtype F4 cannot be read"):
        source.read("a")


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ([torch.bfloat16, torch.float32], torch.float32),
        ([torch.bfloat16, torch.float16], torch.bfloat16),
        ([torch.float16], torch.float16),
        ([torch.float64], torch.float32),
        ([torch.int64, torch.bfloat16], torch.bfloat16),
    ],
)
def test_stored_dtype(stored: list[torch.dtype], expected: torch.dtype, tmp_path: Path) -> None:
    save_file({str(i): torch.ones(2, dtype=dtype) for i, dtype in enumerate(stored)}, tmp_path / SINGLE)
    with TensorSource(tmp_path) as source:
        assert source.stored_dtype() == expected


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        TensorSource(folder)
    return str(caught.value)


def test_no_weights(tmp_path: Path) -> None:
    assert "it holds nothing" in refused(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert f"no {SINGLE} in the directory; it holds pytorch_model.bin" in refused(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"x")
    assert f"oarsmith convert {tmp_path / 'm.gguf'} OUT" in refused(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    (sharded(tmp_path) / "y.safetensors").unlink()
    assert "1 of 2 shards are missing: y.safetensors" in refused(tmp_path)


def test_truncated_shard(tmp_path: Path) -> None:
    path = sharded(tmp_path) / "x.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    message = refused(tmp_path)
    assert "x.safetensors: a" in message and "truncated" in message


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": ["x"]}}'])
def test_damaged_index(text: str, tmp_path: Path) -> None:
    (sharded(tmp_path) / INDEX).write_text(text)
    message = refused(tmp_path)
    assert INDEX in message and "index" in message


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", 3])
def test_an_index_that_points_outside(name: object, tmp_path: Path) -> None:
    (sharded(tmp_path) / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    assert "points outside the directory" in refused(tmp_path)
