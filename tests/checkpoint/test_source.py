"""The tensors of a directory: one file or shards, checked before they are trusted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from oarsmith.checkpoint.safetensors_source import INDEX, SINGLE
from oarsmith.checkpoint.source import open_source
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
    with open_source(write(tmp_path)) as source:
        assert source.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
        assert source.dtypes == {"a": "F32", "b": "BF16", "c.d": "F32", "e": "I64"}
        for name in ("e", "a", "c.d", "b", "a"):  # any order, also twice
            found = source.read(name)
            assert torch.equal(found, TENSORS[name]) and found.dtype == TENSORS[name].dtype


def test_a_tensor_outlives_the_source(tmp_path: Path) -> None:
    with open_source(single(tmp_path)) as source:
        found = source.read("a")
    (tmp_path / SINGLE).write_bytes(b"")
    assert torch.equal(found, TENSORS["a"])


def test_a_file_that_shrinks_meanwhile(tmp_path: Path) -> None:
    with open_source(single(tmp_path)) as source:
        os.truncate(tmp_path / SINGLE, (tmp_path / SINGLE).stat().st_size - 12)
        with pytest.raises(CheckpointError, match="the file ends early"):
            for name in TENSORS:
                source.read(name)


def test_a_dtype_that_torch_does_not_have(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + b"xx")
    with open_source(tmp_path) as source, pytest.raises(CheckpointError, match="dtype F4 cannot be read"):
        source.read("a")


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ([torch.bfloat16, torch.float32], torch.float32),
        ([torch.bfloat16, torch.float16], torch.bfloat16),
        ([torch.float16], torch.float16),
        ([torch.float64], torch.float32),
        ([torch.int64, torch.bfloat16], torch.bfloat16),
        ([torch.bfloat16, torch.bfloat16, torch.float32], torch.bfloat16),
        ([torch.int64], torch.float32),
    ],
)
def test_stored_dtype(stored: list[torch.dtype], expected: torch.dtype, tmp_path: Path) -> None:
    save_file({str(i): torch.ones(2, dtype=dtype) for i, dtype in enumerate(stored)}, tmp_path / SINGLE)
    with open_source(tmp_path) as source:
        assert source.stored_dtype() == expected


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_source(folder)
    return str(caught.value)


def test_no_weights(tmp_path: Path) -> None:
    assert "it holds nothing" in refused(tmp_path)
    (tmp_path / "flax_model.msgpack").write_bytes(b"x")
    assert f"no {SINGLE} in the directory; it holds flax_model.msgpack" in refused(tmp_path)
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


def test_an_index_that_lies(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["more"] = "x.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    assert "says that more lies here" in refused(folder)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    save_file({name: TENSORS[name] for name in ("a", "b")}, folder / "x.safetensors")
    assert "tensor b lies in two shards" in refused(folder)


def test_duplicate_keys(tmp_path: Path) -> None:
    """Readers disagree about which one counts, so a file could mean two models."""
    entry = '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    text = f"{{{entry},{entry}}}".encode()
    (tmp_path / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + b"x")
    assert "the key 'a' occurs twice" in refused(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "model.safetensors", "a": "model.safetensors"}}')
    assert "the key 'a' occurs twice" in refused(tmp_path)


@pytest.mark.parametrize("name", [SINGLE, "pytorch_model.bin"])
def test_links_out_of_the_directory(name: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    (tmp_path / "model" / name).symlink_to(secret)
    assert f"is a link that leads out of the directory, to {secret}" in refused(tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    (tmp_path / "model" / name).symlink_to("../model/../secret")
    assert "leads out of the directory" in refused(tmp_path / "model")


def test_links_that_stay(tmp_path: Path) -> None:
    """Within the directory, and in a hub cache, whose snapshots are links to its blobs."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(TENSORS, blobs / "abcd")
    (snapshot / SINGLE).symlink_to("../../blobs/abcd")
    with open_source(snapshot) as source:
        assert torch.equal(source.read("a"), TENSORS["a"])
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file(TENSORS, inside / "weights")
    (inside / SINGLE).symlink_to("weights")
    with open_source(inside) as source:
        assert torch.equal(source.read("a"), TENSORS["a"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_reading_into_memory_that_is_there(dtype: torch.dtype, tmp_path: Path) -> None:
    """Casting goes through a small buffer: a size that it does not divide."""
    wide = torch.randn(1_300_001, generator=torch.Generator().manual_seed(0))
    save_file({"a": wide}, tmp_path / SINGLE)
    with open_source(tmp_path) as source:
        target = torch.empty(1_300_001, dtype=dtype)
        source.read_into("a", target)
        assert torch.equal(target, wide.to(dtype))
        strided = torch.empty(1_300_001, 2, dtype=dtype)[:, 0]
        source.read_into("a", strided)
        assert torch.equal(strided, wide.to(dtype))
