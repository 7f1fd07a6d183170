"""Safetensors written one tensor at a time, and checked before anything trusts them.

Format: https://github.com/huggingface/safetensors#format. Eight bytes little-endian header length, a JSON header
``{name: {dtype, shape, data_offsets}}``, then the data without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from oarsmith.atomic import atomic_file, atomic_write_text
from oarsmith.checkpoint.files import unique_keys
from oarsmith.errors import CheckpointError

SAFETENSORS_DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
_BITS = {code: dtype.itemsize * 8 for dtype, code in SAFETENSORS_DTYPES.items()}
_BITS |= {"F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_SHARD_BYTES = 5_000_000_000
_REFETCH = "copy or download the file again"


@dataclass(frozen=True)
class TensorInfo:
    """What must be known of a tensor before it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """A tensor inside a checked file: safetensors dtype code, shape, absolute byte range [start, end)."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class SafetensorsFile:
    """A file before it is written: its first bytes, where the data of each tensor begins, and its size."""

    header: bytes
    starts: Mapping[str, int]
    num_bytes: int


def file_layout(
    tensors: Mapping[str, TensorInfo], *, where: str, metadata: Mapping[str, str] | None = None
) -> SafetensorsFile:
    """The layout of a file that holds these tensors.

    Raises:
        CheckpointError: a dtype the format does not have.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    offset, offsets = 0, {}
    # Wide dtypes first: each tensor then begins at a multiple of its item size, as memory maps want.
    for name, info in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        if info.dtype not in SAFETENSORS_DTYPES:
            raise CheckpointError(f"safetensors cannot hold {info.dtype}", where=f"{where}: {name}")
        end = offset + info.num_bytes
        offsets[name] = offset
        code = SAFETENSORS_DTYPES[info.dtype]
        header[name] = {"dtype": code, "shape": list(info.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    first = len(text).to_bytes(8, "little") + text
    return SafetensorsFile(first, {name: len(first) + start for name, start in offsets.items()}, len(first) + offset)


class SafetensorsWriter:
    """Write one safetensors file, tensors in any order, one in memory at a time. A context manager.

    Args:
        path: the file; it appears only when the block ends well and every declared tensor has been written.
        tensors: name -> dtype and shape of everything the file will hold.
        metadata: strings for the header's ``__metadata__``.

    Raises:
        CheckpointError: a dtype the format does not have, the disk is full, or a declared tensor was never written.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorInfo], *, metadata: Mapping[str, str] | None = None
    ) -> None:
        self._path = path
        self._tensors = dict(tensors)
        self._missing = set(self._tensors)
        self._stack = ExitStack()
        self._layout = file_layout(self._tensors, where=str(path), metadata=metadata)
        self._file: BinaryIO | None = None

    def __enter__(self) -> SafetensorsWriter:
        self._file = self._stack.enter_context(atomic_file(self._path, num_bytes=self._layout.num_bytes))
        self._file.write(self._layout.header)
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one declared tensor; it may be dropped afterwards. Device and memory layout are free."""
        assert self._file is not None, "SafetensorsWriter is used outside its with block"
        assert name in self._missing, f"{name} is written twice or was not declared"
        declared = self._tensors[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (declared.dtype, declared.shape), (
            f"{name}: declared {declared}, got {tensor.dtype} {tuple(tensor.shape)}"
        )
        self._missing.remove(name)
        if tensor.numel() == 0:
            return
        self._file.seek(self._layout.starts[name])
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        self._file.write(flat.view(torch.uint8).numpy().data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None and self._missing:
            missing = ", ".join(sorted(self._missing)[:5])
            error = CheckpointError(
                f"{len(self._missing)} declared tensors were never written: {missing}", where=str(self._path)
            )
            self._stack.__exit__(type(error), error, None)
            raise error
        self._stack.__exit__(kind, error, traceback)
        self._file = None


class ShardedSafetensorsWriter:
    """Write a model's tensors into a directory under the Hugging Face names. A context manager.

    One ``model.safetensors`` if everything fits into `max_shard_bytes`, else ``model-00001-of-0000N.safetensors`` and
    so on with ``model.safetensors.index.json``. Run it inside `atomic_directory`, so that the set appears at once.

    Args:
        directory: an existing directory.
        tensors: name -> dtype and shape of all tensors; shards are filled in this order.
        max_shard_bytes: upper size of a shard's data; a tensor larger than this gets a shard of its own.
        stem: first part of the file names, ``model`` for models.
        metadata: strings for each file's ``__metadata__``.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Mapping[str, TensorInfo],
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        stem: str = "model",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._directory, self._stem = directory, stem
        self._total = sum(info.num_bytes for info in tensors.values())
        self._file_of: dict[str, str] = {}
        self._writers: dict[str, SafetensorsWriter] = {}
        self._stack = ExitStack()
        for file, names in shard_names(tensors, max_shard_bytes, stem).items():
            self._file_of.update(dict.fromkeys(names, file))
            chosen = {name: tensors[name] for name in names}
            self._writers[file] = SafetensorsWriter(directory / file, chosen, metadata=metadata)

    def __enter__(self) -> ShardedSafetensorsWriter:
        with ExitStack() as opening:
            for writer in self._writers.values():
                opening.enter_context(writer)
            self._stack = opening.pop_all()
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one declared tensor, in any order."""
        assert name in self._file_of, f"{name} was not declared"
        self._writers[self._file_of[name]].write(name, tensor)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)
        if error is None and len(self._writers) > 1:
            write_index(self._directory / f"{self._stem}.safetensors.index.json", self._file_of, self._total)


def write_index(path: Path, file_of: Mapping[str, str], total: int) -> None:
    """The index of a sharded model: which file holds each tensor, and the number of bytes in all."""
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
    atomic_write_text(path, json.dumps(index, indent=2) + "\n")


def sharded_files(tensors: Mapping[str, TensorInfo], max_shard_bytes: int) -> dict[str, SafetensorsFile]:
    """The files of a model, by name, for writers that fill them in any order."""
    return {
        file: file_layout({name: tensors[name] for name in names}, where=file)
        for file, names in shard_names(tensors, max_shard_bytes).items()
    }


def shard_names(tensors: Mapping[str, TensorInfo], max_shard_bytes: int, stem: str = "model") -> dict[str, list[str]]:
    """File -> names of its tensors: one file, or numbered shards."""
    groups = split_into_shards(tensors, max_shard_bytes)
    count = len(groups)
    parts = ["" if count == 1 else f"-{index:05}-of-{count:05}" for index in range(1, count + 1)]
    return {f"{stem}{part}.safetensors": names for part, names in zip(parts, groups, strict=True)}


def split_into_shards(tensors: Mapping[str, TensorInfo], max_shard_bytes: int) -> list[list[str]]:
    """Names in groups whose tensors fit into `max_shard_bytes`, in their order."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, info in tensors.items():
        if groups[-1] and filled + info.num_bytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += info.num_bytes
    return groups


def check_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Validate a safetensors file without reading its data.

    Returns:
        Every tensor's dtype code, shape and absolute byte range, in file order.

    Raises:
        CheckpointError: missing or truncated file, damaged header, unknown dtype, negative shape, ranges that overlap,
            leave a gap, or do not fit their shape. The message names file and tensor.
    """
    if not path.is_file():
        raise CheckpointError("no such file", where=str(path), fix="check the path")
    header, data_start = _read_header(path)
    header.pop("__metadata__", None)
    stored = {name: _stored_tensor(f"{path}: {name}", entry, data_start) for name, entry in header.items()}
    _check_ranges(path, stored.items(), data_start, path.stat().st_size)
    return stored


def safetensors_metadata(path: Path) -> dict[str, Any]:
    """The header's ``__metadata__``; PaddleNLP's own files say ``{"format": "np"}`` there."""
    metadata = _read_header(path)[0].get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header and the byte where the data starts."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"the header claims {header_bytes:,} bytes, but the file has {size:,}: truncated, or not safetensors",
                where=str(path),
                fix=_REFETCH,
            )
        return _parse_header(path, file.read(header_bytes)), 8 + header_bytes


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the header is not JSON ({error})", where=str(path), fix=_REFETCH) from error
    if not isinstance(header, dict):
        raise CheckpointError("the header is not a JSON object", where=str(path), fix=_REFETCH)
    return header


def _stored_tensor(where: str, entry: object, data_start: int) -> StoredTensor:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError("the header entry lacks dtype, shape or data_offsets", where=where, fix=_REFETCH)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"unknown dtype {dtype!r}; known are {', '.join(_BITS)}", where=where)
    if not _whole_numbers(shape) or not storable(shape):
        raise CheckpointError(
            f"shape {shape!r} is not a list of non-negative whole numbers of sane size", where=where, fix=_REFETCH
        )
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"data_offsets {offsets!r} are not two non-negative whole numbers", where=where, fix=_REFETCH
        )
    expected = math.prod(shape) * _BITS[dtype] // 8
    if offsets[1] - offsets[0] != expected:
        raise CheckpointError(
            f"{dtype} {shape} takes {expected:,} bytes, data_offsets {offsets} give {offsets[1] - offsets[0]:,}",
            where=where,
            fix=_REFETCH,
        )
    return StoredTensor(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def storable(shape: Sequence[int]) -> bool:
    """Whether PyTorch can hold a tensor of this shape, memory aside: few axes, and strides that fit 64 bits."""
    return len(shape) <= 16 and math.prod(max(size, 1) for size in shape) < 2**60


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_ranges(path: Path, tensors: Iterable[tuple[str, StoredTensor]], data_start: int, size: int) -> None:
    expected = data_start
    previous = "the header"
    for name, tensor in sorted(tensors, key=lambda item: (item[1].start, item[1].end)):
        if tensor.end > size:
            raise CheckpointError(
                f"the file is truncated: the tensor ends at byte {tensor.end:,}, the file has {size:,}",
                where=f"{path}: {name}",
                fix=_REFETCH,
            )
        if tensor.start != expected:
            kind = "overlaps" if tensor.start < expected else "leaves a gap after"
            raise CheckpointError(f"its data {kind} {previous}", where=f"{path}: {name}", fix=_REFETCH)
        expected, previous = tensor.end, name
    if expected != size:
        raise CheckpointError(
            f"the tensors end at byte {expected:,}, but the file has {size:,}", where=str(path), fix=_REFETCH
        )
