"""``pytorch_model.bin`` written one tensor at a time, in the zip format of ``torch.save``."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from oarsmith.atomic import atomic_file
from oarsmith.checkpoint.safetensors_stream import MAX_SHARD_BYTES, TensorInfo, split_into_shards, write_index
from oarsmith.errors import CheckpointError

_ALIGNMENT = 64  # PyTorch's own, so that files can be memory-mapped
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


class _Planned:
    """A tensor that is not there yet: what the pickle says of it."""

    def __init__(self, key: int, info: TensorInfo) -> None:
        self.key, self.info = key, info


class _Key:
    def __init__(self, planned: _Planned) -> None:
        self.planned = planned


class _Pickler(pickle.Pickler):
    """Pickles planned tensors as PyTorch does real ones."""

    def persistent_id(self, value: object) -> object:
        if not isinstance(value, _Key):
            return None
        info = value.planned.info
        count = info.num_bytes // info.dtype.itemsize
        return ("storage", _STORAGES[info.dtype], str(value.planned.key), "cpu", count)

    def reducer_override(self, value: object) -> Any:
        if not isinstance(value, _Planned):
            return NotImplemented
        shape = value.info.shape
        stride = tuple(torch.empty(shape, device="meta").stride())
        arguments: tuple[object, ...] = (_Key(value), 0, shape, stride, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class TorchBinWriter:
    """One ``.bin`` file; tensors must be written in the order they were declared. A context manager."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]) -> None:
        for name, info in tensors.items():
            if info.dtype not in _STORAGES:
                raise CheckpointError(f"this format cannot hold {info.dtype}", where=f"{path}: {name}")
        self._path, self._tensors = path, dict(tensors)
        self._keys = {name: key for key, name in enumerate(tensors)}
        self._missing = set(tensors)
        self._stack = ExitStack()

    def __enter__(self) -> TorchBinWriter:
        with ExitStack() as opening:
            total = sum(info.num_bytes for info in self._tensors.values())
            self._file: BinaryIO = opening.enter_context(atomic_file(self._path, num_bytes=total))
            self._zip = opening.enter_context(zipfile.ZipFile(self._file, "w", allowZip64=True))
            text = BytesIO()
            planned = {name: _Planned(self._keys[name], info) for name, info in self._tensors.items()}
            _Pickler(text, protocol=2).dump(OrderedDict(planned))
            self._member("data.pkl", memoryview(text.getvalue()))
            self._member("byteorder", memoryview(b"little"))
            self._stack = opening.pop_all()
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one declared tensor; it may be dropped afterwards."""
        assert name in self._missing, f"{name} is written twice or was not declared"
        declared = self._tensors[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (declared.dtype, declared.shape), f"{name}: {declared}"
        self._missing.remove(name)
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        self._member(
            f"data/{self._keys[name]}", flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
        )

    def _member(self, name: str, data: memoryview) -> None:
        info = zipfile.ZipInfo(f"model/{name}")
        info.file_size = len(data)
        large = len(data) * 1.05 > zipfile.ZIP64_LIMIT  # zipfile's own rule; it then puts 20 bytes of its own first
        head = self._file.tell() + 30 + len(info.filename.encode()) + (20 if large else 0) + 4
        padding = -head % _ALIGNMENT
        info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        with self._zip.open(info, "w") as member:
            member.write(data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None and self._missing:
            error = CheckpointError(f"{len(self._missing)} declared tensors were never written", where=str(self._path))
            self._stack.__exit__(type(error), error, None)
            raise error
        if error is None:
            self._member("version", memoryview(b"3\n"))
        self._stack.__exit__(kind, error, traceback)


class ShardedTorchBinWriter:
    """``pytorch_model.bin``, or shards with an index; one shard is open at a time. A context manager.

    Tensors must be written in the order they were declared.
    """

    def __init__(
        self, directory: Path, tensors: Mapping[str, TensorInfo], *, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        groups = split_into_shards(tensors, max_shard_bytes)
        count = len(groups)
        self._directory = directory
        self._file_of = {
            name: "pytorch_model.bin" if count == 1 else f"pytorch_model-{index:05}-of-{count:05}.bin"
            for index, names in enumerate(groups, start=1)
            for name in names
        }
        self._tensors = dict(tensors)
        self._current = ""
        self._stack = ExitStack()

    def __enter__(self) -> ShardedTorchBinWriter:
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next declared tensor."""
        file = self._file_of[name]
        if file != self._current:
            self._stack.close()
            chosen = {other: self._tensors[other] for other, home in self._file_of.items() if home == file}
            self._writer = self._stack.enter_context(TorchBinWriter(self._directory / file, chosen))
            self._current = file
        self._writer.write(name, tensor)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)
        files = set(self._file_of.values())
        if error is None and len(files) > 1:
            total = sum(info.num_bytes for info in self._tensors.values())
            write_index(self._directory / "pytorch_model.bin.index.json", self._file_of, total)
