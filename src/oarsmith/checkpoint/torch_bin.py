"""``pytorch_model.bin`` as a source of tensors: the zip format and the older one, without running the pickle.

The pickle is played on our own machine (`pickles.py`) that makes *records* of tensors: storage, offset, size, stride.
Contents are read from the file one tensor at a time. Formats: torch/serialization.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from oarsmith.checkpoint.files import REFETCH, check_shard, read_shards, require_inside
from oarsmith.checkpoint.pickles import FileBytes, PickleMachine, Vocabulary, pairs
from oarsmith.checkpoint.ranges import RangeReader
from oarsmith.checkpoint.safetensors_stream import SAFETENSORS_DTYPES, storable
from oarsmith.checkpoint.tensors import TensorSource
from oarsmith.checkpoint.torch_zip import is_zip, zip_members
from oarsmith.errors import CheckpointError

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


@dataclass(frozen=True)
class Storage:
    """A run of ``num_elements`` numbers in the file, under a key."""

    key: str
    dtype: torch.dtype
    num_elements: int


@dataclass(frozen=True)
class TensorRecord:
    """A view of a storage, in elements of ``dtype``."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements from the view's first to its last one, both included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))


def _counts(value: object) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or not all(type(item) is int and item >= 0 for item in value):
        raise ValueError(f"{str(value)[:100]} is not a list of non-negative whole numbers")
    return tuple(value)


def _rebuild(arguments: tuple[object, ...]) -> object:
    """``torch._utils._rebuild_tensor_v2(storage, offset, size, stride, ...)``; v3 adds the dtype as seventh."""
    storage, offset, size, stride = arguments[:4]
    dtype = arguments[6] if len(arguments) > 6 else None
    (start,), shape, strides = _counts((offset,)), _counts(size), _counts(stride)
    if not isinstance(storage, Storage) or len(shape) != len(strides) or not storable(shape):
        raise ValueError(f"a tensor of shape {str(shape)[:100]} and stride {str(strides)[:100]}")
    kind = dtype if isinstance(dtype, torch.dtype) else storage.dtype
    record = TensorRecord(storage, kind, start, shape, strides)
    if (start + record.span) * kind.itemsize > storage.num_elements * storage.dtype.itemsize:
        raise ValueError(f"a tensor of shape {shape} reaches beyond its storage of {storage.num_elements:,} elements")
    if math.prod(shape) * kind.itemsize > storage.num_elements * storage.dtype.itemsize:
        raise ValueError(f"a tensor of shape {shape} repeats a storage of {storage.num_elements:,} elements")
    return record


def _persistent(value: object) -> object:
    """``("storage", type, key, location, count)``; older files add the view of another storage, always None."""
    if (
        not isinstance(value, tuple)
        or len(value) not in (5, 6)
        or value[0] != "storage"
        or value[5:] not in ((), (None,))
    ):
        raise ValueError(f"an unknown persistent id of {len(value) if isinstance(value, tuple) else 0} parts")
    _, dtype, key, _, count = value[:5]
    if not isinstance(dtype, torch.dtype) or not isinstance(key, (str, int)):
        raise ValueError("an unknown kind of storage")
    return Storage(str(key), dtype, _counts((count,))[0])


def _ordered_dict(arguments: tuple[object, ...]) -> object:
    items = arguments[0] if arguments else []
    if not isinstance(items, (list, tuple)) or not all(isinstance(i, (list, tuple)) and len(i) == 2 for i in items):
        raise ValueError("an OrderedDict of something else than pairs")
    return pairs([part for item in items for part in item])


VOCABULARY = Vocabulary(
    calls={
        "collections OrderedDict": _ordered_dict,
        "torch._utils _rebuild_tensor": _rebuild,
        "torch._utils _rebuild_tensor_v2": _rebuild,
        "torch._utils _rebuild_tensor_v3": _rebuild,
        "torch._utils _rebuild_parameter": lambda arguments: arguments[0],
    },
    values={f"torch {name}": dtype for name, dtype in _STORAGES.items()}
    | {f"torch.storage {name}": dtype for name, dtype in _STORAGES.items()}
    | {str(dtype).replace(".", " "): dtype for dtype in SAFETENSORS_DTYPES},
    persistent=_persistent,
)


class TorchBinSource(TensorSource):
    """The tensors of one ``.bin`` file or of the shards of an index. Raises CheckpointError as it reads headers."""

    def __init__(self, path: Path) -> None:
        self.directory = path.parent
        self.shapes, self.dtypes = {}, {}
        self._records: dict[str, tuple[Path, int, TensorRecord]] = {}
        self._reader = RangeReader()
        shards = read_shards(path) if path.suffix == ".json" else {path.name: []}
        for file, promised in shards.items():
            shard = require_inside(self.directory, self.directory / file)
            records, storages = read_torch_file(shard)
            check_shard(path, shard, promised, set(records), set(self.shapes))
            for name, record in records.items():
                self._records[name] = (shard, storages[record.storage.key].start, record)
                self.shapes[name], self.dtypes[name] = record.shape, SAFETENSORS_DTYPES[record.dtype]

    def read(self, name: str) -> Tensor:
        path, start, record = self._records[name]
        size = record.dtype.itemsize
        data = self._reader.read(path, start + record.offset * size, record.span * size).view(record.dtype)
        if 0 in record.shape:
            return data.reshape(record.shape)
        return data.as_strided(record.shape, record.stride).contiguous()

    def close(self) -> None:
        self._reader.close()


def read_torch_file(path: Path) -> tuple[dict[str, TensorRecord], dict[str, FileBytes]]:
    """Tensor records by name, and where each storage lies. Contents are not read.

    Raises:
        CheckpointError: a damaged file, a pickle that asks for anything but tensors, views outside of their storage.
    """
    if not path.is_file():
        raise CheckpointError("no such file", where=str(path), fix="check the path")
    value, storages = _read_zip(path) if is_zip(path) else _read_legacy(path)
    if not isinstance(value, dict) or not value:
        raise CheckpointError("holds no dictionary of tensors", where=str(path), fix="save model.state_dict()")
    records: dict[str, TensorRecord] = {}
    for name, record in value.items():
        if not isinstance(name, str) or not isinstance(record, TensorRecord):
            raise CheckpointError(
                f"entry {str(name)[:100]!r} is a {type(record).__name__}, not a tensor: this is no state dict",
                where=str(path),
                fix="save model.state_dict()",
            )
        storage = storages.get(record.storage.key)
        if storage is None or storage.length < record.storage.num_elements * record.storage.dtype.itemsize:
            held = 0 if storage is None else storage.length
            raise CheckpointError(
                f"its storage {record.storage.key} claims {record.storage.num_elements:,} elements, "
                f"the file has {held:,} bytes",
                where=f"{path}: {name}",
                fix=REFETCH,
            )
        records[name] = record
    return records, storages


def _read_zip(path: Path) -> tuple[object, dict[str, FileBytes]]:
    members = zip_members(path)
    if "data.pkl" not in members:
        raise CheckpointError("a zip file, but not one of PyTorch: no data.pkl", where=str(path))
    part = members["data.pkl"]
    with path.open("rb") as file:
        if "byteorder" in members:
            file.seek(members["byteorder"].start)
            if file.read(min(members["byteorder"].length, 16)) != b"little":
                raise CheckpointError("written on a big-endian machine", where=str(path))
        value = PickleMachine(file, part.start, part.start + part.length, where=path, vocabulary=VOCABULARY).load()
    storages = {name.removeprefix("data/"): place for name, place in members.items() if name.startswith("data/")}
    return value, storages


def _read_legacy(path: Path) -> tuple[object, dict[str, FileBytes]]:
    """Five pickles (magic, version, system, the object, storage keys), then each storage behind its element count."""
    size = path.stat().st_size
    with path.open("rb") as file:
        position, values = 0, []
        for step in range(5):
            machine = PickleMachine(file, position, size, where=path, vocabulary=VOCABULARY)
            values.append(machine.load())
            position = machine.position
            if step == 0 and values[0] != _LEGACY_MAGIC:
                raise CheckpointError("not a file of PyTorch", where=str(path), fix=REFETCH)
        _, version, system, value, keys = values
        if version != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
            raise CheckpointError("an unknown version of PyTorch's older format", where=str(path))
        sizes = _element_sizes(value)
        if not isinstance(keys, list) or {str(key) for key in keys} != set(sizes) or len(keys) != len(sizes):
            raise CheckpointError("the storages listed are not those the tensors use", where=str(path), fix=REFETCH)
        return value, _legacy_storages(file, path, position, size, [(str(key), sizes[str(key)]) for key in keys])


def _element_sizes(value: object) -> dict[str, int]:
    records = value.values() if isinstance(value, dict) else ()
    return {r.storage.key: r.storage.dtype.itemsize for r in records if isinstance(r, TensorRecord)}


def _legacy_storages(
    file: BinaryIO, path: Path, position: int, size: int, keys: list[tuple[str, int]]
) -> dict[str, FileBytes]:
    found = {}
    for key, item_size in keys:
        file.seek(position)
        head = file.read(8)
        num_bytes = int.from_bytes(head, "little") * item_size
        if len(head) < 8 or num_bytes > size - position - 8:
            raise CheckpointError(
                f"the file is truncated: storage {key} claims {num_bytes:,} bytes", where=str(path), fix=REFETCH
            )
        found[key] = FileBytes(position + 8, num_bytes)
        position += 8 + num_bytes
    return found
