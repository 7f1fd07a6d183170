"""``pytorch_model.bin``: read without running it, written so that PyTorch reads it."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from oarsmith.checkpoint.safetensors_stream import TensorInfo
from oarsmith.checkpoint.source import open_source
from oarsmith.checkpoint.torch_bin import INDEX, SINGLE, TorchBinSource
from oarsmith.checkpoint.torch_bin_write import ShardedTorchBinWriter, TorchBinWriter
from oarsmith.errors import CheckpointError


def tensors() -> dict[str, Tensor]:
    base = torch.arange(200, dtype=torch.float32).reshape(10, 20)
    return {
        "plain": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
        "whole": base,
        "transposed": base.t(),
        "window": base[2:5, 3:],
        "stepped": base[::2, ::3],
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3),
        "half": torch.arange(5).half(),
        "bfloat": torch.arange(5).bfloat16(),
        "flags": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "short": torch.arange(5).to(torch.uint16),
        "eight": torch.arange(4).to(torch.float8_e4m3fn),
    }


def same(found: Tensor, expected: Tensor) -> bool:
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return False
    return torch.equal(found.double(), expected.detach().double())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
def test_reading_what_torch_writes(zipped: bool, tmp_path: Path) -> None:
    torch.save(tensors(), tmp_path / SINGLE, _use_new_zipfile_serialization=zipped)
    with open_source(tmp_path) as source:
        assert source.shapes == {name: tuple(tensor.shape) for name, tensor in tensors().items()}
        for name, tensor in tensors().items():
            assert same(source.read(name), tensor), name


def test_a_state_dict_with_metadata(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    torch.save(module.state_dict(), tmp_path / SINGLE)
    with open_source(tmp_path) as source:
        assert list(source.shapes) == ["0.weight", "0.bias", "1.weight", "1.bias"]
        assert same(source.read("0.weight"), module[0].weight)


def test_shards(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    files = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": files}))
    with open_source(tmp_path) as source:
        assert same(source.read("a"), torch.ones(2)) and same(source.read("b"), torch.zeros(3))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": files | {"c": files["a"]}}))
    with pytest.raises(CheckpointError, match=r"says that c lies here"):
        open_source(tmp_path)
    torch.save({"b": torch.zeros(3), "a": torch.ones(2)}, tmp_path / files["b"])
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": files}))
    with pytest.raises(CheckpointError, match="tensor a lies in two shards"):
        open_source(tmp_path)


def test_memory_is_one_tensor(tmp_path: Path) -> None:
    """A view reads its own span, not its storage."""
    base = torch.zeros(1000, 1000)
    torch.save({"a": base[10:12]}, tmp_path / SINGLE)
    with TorchBinSource(tmp_path / SINGLE) as source:
        assert source.read("a").untyped_storage().nbytes() == 8000


@pytest.mark.parametrize("limit", [10**9, 2000])
def test_torch_reads_what_is_written(limit: int, tmp_path: Path) -> None:
    written = {name: t.detach().contiguous() for name, t in tensors().items() if name not in ("short", "eight")}
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in written.items()}
    with ShardedTorchBinWriter(tmp_path, infos, max_shard_bytes=limit) as writer:
        for name, tensor in written.items():
            writer.write(name, tensor)
    files = sorted(tmp_path.glob("*.bin"))
    assert (len(files) == 1) == (limit == 10**9) and (tmp_path / INDEX).exists() == (limit == 2000)
    for mmap in (False, True):
        found: dict[str, Tensor] = {}
        for file in files:
            found |= torch.load(file, weights_only=True, mmap=mmap)
        assert list(found) == list(written) and all(same(found[name], written[name]) for name in written)
    with open_source(tmp_path) as source:
        assert all(same(source.read(name), written[name]) for name in written)


def test_data_lies_at_multiples_of_64(tmp_path: Path) -> None:
    with TorchBinWriter(tmp_path / SINGLE, {"a": TensorInfo(torch.int8, (7,)), "b": TensorInfo(torch.int8, (9,))}) as w:
        w.write("a", torch.ones(7, dtype=torch.int8))
        w.write("b", torch.ones(9, dtype=torch.int8))
    with TorchBinSource(tmp_path / SINGLE) as source:
        assert all(start % 64 == 0 for _, start, _ in source._records.values())


def test_a_writer_that_was_given_too_little(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="never written"),
        TorchBinWriter(tmp_path / SINGLE, {"a": TensorInfo(torch.float32, (2,))}),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> object:
        return os.system, (f"touch {self.marker}",)


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        TorchBinSource(path)
    return str(caught.value)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
def test_nothing_is_imported(zipped: bool, tmp_path: Path) -> None:
    marker = tmp_path / "was_here"
    torch.save({"a": torch.ones(2), "b": Evil(marker)}, tmp_path / SINGLE, _use_new_zipfile_serialization=zipped)
    message = refused(tmp_path / SINGLE)
    assert "system, which is not part of a checkpoint" in message and "nothing was run" in message
    assert not marker.exists()


def test_a_whole_module(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / SINGLE)
    assert "asks for torch.nn.modules.linear.Linear" in refused(tmp_path / SINGLE)


@pytest.mark.parametrize("value", [{"a": 3}, {3: torch.ones(1)}, [torch.ones(1)], {"a": {"b": torch.ones(1)}}, {}])
def test_something_else_than_a_state_dict(value: object, tmp_path: Path) -> None:
    torch.save(value, tmp_path / SINGLE)
    assert "save model.state_dict()" in refused(tmp_path / SINGLE)


def rezip(path: Path, change: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive with members replaced or left out."""
    with zipfile.ZipFile(path) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    out = path.with_name("changed.bin")
    with zipfile.ZipFile(out, "w", compression) as new:
        for name, data in members.items():
            ending = name.partition("/")[2]
            if change.get(ending, data) is not None:
                new.writestr(name, change.get(ending, data))
    return out


@pytest.fixture
def good(tmp_path: Path) -> Path:
    torch.save({"a": torch.arange(6.0).reshape(2, 3)}, tmp_path / SINGLE)
    return tmp_path / SINGLE


def test_a_zip_bomb(good: Path) -> None:
    bomb = rezip(good, {"data/0": bytes(50_000_000)}, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 100_000
    assert "compressed or encrypted member" in refused(bomb)


def test_zip_structure(good: Path) -> None:
    assert "no data.pkl" in refused(rezip(good, {"data.pkl": None}))
    assert "the file has 0 bytes" in refused(rezip(good, {"data/0": None}))
    assert "claims 6 elements, the file has 23 bytes" in refused(rezip(good, {"data/0": bytes(23)}))
    assert "big-endian" in refused(rezip(good, {"byteorder": b"big"}))
    with zipfile.ZipFile(good, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(archive.infolist()[-1].filename, b"again")
    assert "two members of this name" in refused(good)


def test_members_that_share_bytes(good: Path) -> None:
    """A directory entry moved onto another member's header (the 'zip quine' kind of bomb)."""
    data = bytearray(rezip(good, {"x1": b"1" * 40}).read_bytes())
    first = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", first + 1)
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    good.write_bytes(bytes(data))
    assert "overlaps" in refused(good) or "damaged" in refused(good)


@pytest.mark.parametrize("length", [0, 1, 3, 30, 200, -1, -20, -100])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
def test_truncated(length: int, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    torch.save({"a": torch.arange(6.0)}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:length])
    refused(path)


class Rebuilt:
    """Pickles as a call of ``_rebuild_tensor_v2`` with any arguments."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __reduce__(self) -> object:
        return torch._utils._rebuild_tensor_v2, self.arguments


class StorageId:
    def __init__(self, count: object = 6) -> None:
        self.count = count


class HostilePickler(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        return ("storage", torch.FloatStorage, "0", "cpu", value.count) if isinstance(value, StorageId) else None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((StorageId(), 0, (-2, -3), (3, 1), False, OrderedDict()), "non-negative"),
        ((StorageId(), -1, (2, 3), (3, 1), False, OrderedDict()), "non-negative"),
        ((StorageId(), 0, (2, 3), (-3, 1), False, OrderedDict()), "non-negative"),
        ((StorageId(), 1, (2, 3), (3, 1), False, OrderedDict()), "reaches beyond its storage"),
        ((StorageId(), 0, (2, 3), (4, 1), False, OrderedDict()), "reaches beyond its storage"),
        ((StorageId(), 0, (10**9, 10**9), (0, 0), False, OrderedDict()), "a tensor of shape|repeats"),
        ((StorageId(), 0, (10**6,), (0,), False, OrderedDict()), "repeats a storage"),
        ((StorageId(10**12), 0, (10**12,), (1,), False, OrderedDict()), "claims 1,000,000,000,000 elements"),
        ((StorageId(True), 0, (2, 3), (3, 1), False, OrderedDict()), "non-negative"),
        ((StorageId(), 0, (2, 3), (3,), False, OrderedDict()), "a tensor of shape"),
        ((StorageId(), 0, "ab", (3, 1), False, OrderedDict()), "non-negative"),
        (("no storage", 0, (2, 3), (3, 1), False, OrderedDict()), "a tensor of shape"),
        ((StorageId(),), "damaged pickle"),
    ],
)
def test_hostile_records(arguments: tuple[object, ...], message: str, good: Path, tmp_path: Path) -> None:
    with (tmp_path / "p").open("wb") as file:
        HostilePickler(file, protocol=2).dump({"a": Rebuilt(*arguments)})
    path = rezip(good, {"data.pkl": (tmp_path / "p").read_bytes()})
    with pytest.raises(CheckpointError, match=message):
        TorchBinSource(path)


def test_safetensors_come_first(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.save({"a": torch.ones(2)}, tmp_path / SINGLE)
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    with open_source(tmp_path) as source:
        assert same(source.read("a"), torch.zeros(2))
