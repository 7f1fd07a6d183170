from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from oarsmith.checkpoint.safetensors_stream import (
    SAFETENSORS_DTYPES,
    SafetensorsWriter,
    ShardedSafetensorsWriter,
    TensorInfo,
    check_safetensors,
)
from oarsmith.errors import CheckpointError


def sample_tensors() -> dict[str, torch.Tensor]:
    """Every dtype of the format, odd sizes, an empty one, a scalar, a transposed view."""
    torch.manual_seed(0)
    tensors = {
        f"t.{code}": torch.randint(0, 2, (3, 5, 7)).to(dtype)
        for dtype, code in SAFETENSORS_DTYPES.items()
        if dtype is not torch.complex64  # the reference package reads it, but torch cannot compare it bytewise below
    }
    return tensors | {"empty": torch.empty(0, 4), "scalar": torch.tensor(3.5), "view": torch.randn(4, 6).T}


def infos(tensors: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def test_the_reference_package_reads_what_is_written(tmp_path: Path) -> None:
    tensors = sample_tensors()
    path = tmp_path / "m.safetensors"
    with SafetensorsWriter(path, infos(tensors), metadata={"format": "pt", "who": "é"}) as writer:
        for name in sorted(tensors, reverse=True):  # any order
            writer.write(name, tensors[name])
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].double(), tensor.double()), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "é"}
    stored = check_safetensors(path)
    assert stored["view"].shape == (6, 4)
    assert all(tensor.start % 4 == 0 for name, tensor in stored.items() if "F32" in tensor.dtype)


def test_check_accepts_the_reference_package_s_files(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in sample_tensors().items()}
    save_file(tensors, tmp_path / "m.safetensors")
    stored = check_safetensors(tmp_path / "m.safetensors")
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }


def test_nothing_appears_unless_everything_was_written(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    declared = {"a": TensorInfo(torch.float32, (2,)), "b": TensorInfo(torch.float32, (2,))}
    never = pytest.raises(CheckpointError, match="1 declared tensors were never written: b")
    with never, SafetensorsWriter(path, declared) as writer:
        writer.write("a", torch.zeros(2))
    with pytest.raises(KeyError), SafetensorsWriter(path, declared) as writer:
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    for name, tensor in [("c", torch.zeros(2)), ("a", torch.zeros(3)), ("a", torch.zeros(2).half())]:
        with pytest.raises(AssertionError), SafetensorsWriter(path, declared) as writer:
            writer.write(name, tensor)
    with pytest.raises(CheckpointError, match=r"cannot hold torch\.complex128"):
        SafetensorsWriter(path, {"z": TensorInfo(torch.complex128, (1,))})


def test_disk_full_is_said_before_writing(tmp_path: Path) -> None:
    declared = {"a": TensorInfo(torch.float32, (10**9, 10**9))}
    with pytest.raises(CheckpointError, match="disk is full"), SafetensorsWriter(tmp_path / "m", declared):
        pass
    assert list(tmp_path.iterdir()) == []


def test_shards_and_index(tmp_path: Path) -> None:
    tensors = {f"layer.{index}": torch.full((10,), float(index)) for index in range(5)}
    tensors["huge"] = torch.randn(100)
    with ShardedSafetensorsWriter(tmp_path, infos(tensors), max_shard_bytes=100) as writer:
        for name, tensor in reversed(tensors.items()):
            writer.write(name, tensor)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 600
    assert index["weight_map"].keys() == tensors.keys()
    assert len(list(tmp_path.glob("model-0000?-of-00004.safetensors"))) == 4
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def test_one_file_has_no_index(tmp_path: Path) -> None:
    with ShardedSafetensorsWriter(tmp_path, {"a": TensorInfo(torch.float32, (2,))}) as writer:
        writer.write("a", torch.zeros(2))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry()}, 4, "a: the file is truncated: the tensor ends at byte"),
        ({"a": entry()}, 12, "the tensors end at byte"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, 12, "b: its data overlaps a"),
        ({"a": entry(), "b": entry(offsets=[12, 20])}, 20, "b: its data leaves a gap after a"),
        ({"a": entry(shape=[-2])}, 8, r"a: shape \[-2\] is not"),
        ({"a": entry(shape=[True, 2])}, 8, "a: shape"),
        ({"a": entry(shape="2")}, 8, "a: shape"),
        ({"a": entry(shape=[3])}, 8, r"a: F32 \[3\] takes 12 bytes, .* give 8"),
        ({"a": entry(offsets=[8, 0])}, 8, "give -8"),
        ({"a": entry(offsets=[0])}, 8, "not two"),
        ({"a": entry(dtype="F31")}, 8, "unknown dtype 'F31'; known are F64"),
        ({"a": entry(dtype=["F32"])}, 8, "unknown dtype"),
        ({"a": entry(shape=[2**62, 2**62], offsets=[0, 2**126])}, 8, "sane size"),
        ({"a": {"dtype": "F32"}}, 8, "lacks dtype, shape or data_offsets"),
        ({"a": 3}, 8, "lacks dtype"),
        ([1, 2], 8, "not a JSON object"),
    ],
)
def test_hostile_headers(header: Any, data: int, message: str, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    with pytest.raises(CheckpointError, match=message) as caught:
        check_safetensors(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "claims 0 bytes, but the file has 0"),
        (b"\x01", "truncated, or not safetensors"),
        (b"\xff" * 16, "truncated, or not safetensors"),
        ((4).to_bytes(8, "little") + b"nope", "not JSON"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "not JSON"),
        ((90_000).to_bytes(8, "little") + b"[" * 90_000, "not JSON"),
    ],
)
def test_not_a_header(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        check_safetensors(path)
    with pytest.raises(CheckpointError, match="no such file"):
        check_safetensors(tmp_path / "absent.safetensors")
