"""A bounds-checked GGUF reader: header and metadata here, block formats from the `gguf` package.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package's own reader slices a memory map without
looking at its end, so a cut or hostile file gives an IndexError or a loop of 2**64 steps; it also takes 3 s for a
vocabulary of 49k (this one: 0.1 s).
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from oarsmith.checkpoint.files import REFETCH
from oarsmith.checkpoint.gguf_cursor import Cursor, check_version
from oarsmith.errors import CheckpointError

_MAX_DIMS = 4
_CHUNK_ELEMENTS = 1 << 22  # 16 MiB of float32: the working set of a dequantization, whatever the tensor's size


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies. `shape` is in row-major order (GGUF stores it reversed)."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    num_bytes: int


class GgufFile:
    """A GGUF file whose header, metadata and tensor ranges have been checked.

    Attributes:
        metadata: key -> number, bool, string or list.
        tensors: name -> `GgufTensor`, in file order.
        num_bytes: size of the file.

    Raises:
        CheckpointError: not a GGUF file, a version this reader does not know, big-endian, truncated, one part of a
            split file, or inconsistent; the message names what was expected and what is there.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError("no such file", where=str(path), fix="check the path")
        self.path = path
        self.num_bytes = path.stat().st_size
        if self.num_bytes < 24:
            raise CheckpointError(
                f"a GGUF file has at least 24 bytes, this one {self.num_bytes}", where=str(path), fix=REFETCH
            )
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = Cursor(path, data)
            check_version(cursor)
            num_tensors = cursor.u64("the tensor count")
            num_keys = cursor.u64("the metadata count")
            self.metadata = self._read_metadata(cursor, num_keys)
            self.tensors = self._read_tensors(cursor, num_tensors)
        if self.metadata.get("split.count", 0) > 1:
            raise CheckpointError(
                f"this is one of {self.metadata['split.count']} parts of a split model",
                where=str(path),
                fix="join the parts first: llama-gguf-split --merge FIRST_PART OUT.gguf",
            )

    def _read_metadata(self, cursor: Cursor, count: int) -> dict[str, Any]:
        cursor.require(count * 13, f"metadata of {count:,} keys")
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = cursor.string("a metadata key")
            if key in metadata:
                raise CheckpointError(f"the metadata key {key!r} occurs twice", where=str(self.path), fix=REFETCH)
            metadata[key] = cursor.value(cursor.value_type(key), key)
        return metadata

    def _read_tensors(self, cursor: Cursor, count: int) -> dict[str, GgufTensor]:
        cursor.require(count * 24, f"a list of {count:,} tensors")
        found = [self._read_tensor_info(cursor) for _ in range(count)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise CheckpointError(f"general.alignment {alignment!r} is not a power of two", where=str(self.path))
        data_start = -(-cursor.offset // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        end = data_start
        for tensor in sorted(found, key=lambda item: item.start):
            placed = GgufTensor(tensor.name, tensor.shape, tensor.type, data_start + tensor.start, tensor.num_bytes)
            where = f"{self.path}: {tensor.name}"
            if tensor.name in tensors:
                raise CheckpointError("the tensor occurs twice", where=where, fix=REFETCH)
            if placed.start < end or tensor.start % alignment:
                raise CheckpointError(
                    "the tensor's data overlaps another's or is not aligned", where=where, fix=REFETCH
                )
            end = placed.start + placed.num_bytes
            tensors[tensor.name] = placed
        if tensors and end > self.num_bytes:  # a file of metadata alone may end before the alignment
            raise CheckpointError(
                f"the file is truncated: {len(tensors)} tensors need {end:,} bytes, the file has {self.num_bytes:,}",
                where=str(self.path),
                fix=REFETCH,
            )
        return {tensor.name: tensors[tensor.name] for tensor in found}

    def _read_tensor_info(self, cursor: Cursor) -> GgufTensor:
        """`start` is still relative to the data section, whose place is known only after the last entry."""
        name = cursor.string("a tensor name")
        where = f"{self.path}: {name}"
        num_dims = cursor.u32(name)
        if not 1 <= num_dims <= _MAX_DIMS:
            raise CheckpointError(f"the tensor has {num_dims} dimensions, 1 to {_MAX_DIMS} are possible", where=where)
        shape = tuple(reversed([cursor.u64(name) for _ in range(num_dims)]))
        number = cursor.u32(name)
        start = cursor.u64(name)
        if number not in GGMLQuantizationType.__members__.values():
            raise CheckpointError(
                f"tensor type {number} is not known to the installed gguf package",
                where=where,
                fix="pip install --upgrade gguf, or quantize the model to a common type such as Q8_0",
            )
        kind = GGMLQuantizationType(number)
        block_elements, block_bytes = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block_elements:
            raise CheckpointError(f"shape {shape} does not fill {kind.name} blocks of {block_elements}", where=where)
        return GgufTensor(name, shape, kind, start, math.prod(shape) // block_elements * block_bytes)

    def same_bytes(self, first: GgufTensor, second: GgufTensor) -> bool:
        """Whether two tensors are the same bytes."""
        if first.num_bytes != second.num_bytes:
            return False
        steps = range(0, first.num_bytes, _CHUNK_ELEMENTS)
        with self.path.open("rb") as file:
            return all(
                self._bytes(file, first.start + at, min(_CHUNK_ELEMENTS, first.num_bytes - at))
                == self._bytes(file, second.start + at, min(_CHUNK_ELEMENTS, first.num_bytes - at))
                for at in steps
            )

    def _bytes(self, file: BinaryIO, start: int, count: int) -> bytes:
        """Read, not mapped: pages of a mapping would count as this process's memory until it is closed."""
        file.seek(start)
        data = file.read(count)
        if len(data) != count:
            raise CheckpointError("the file has become shorter while it was read", where=str(self.path), fix=REFETCH)
        return data

    def read(self, tensor: GgufTensor, dtype: torch.dtype, *, index: int | None = None) -> torch.Tensor:
        """Dequantize in float32, cast to `dtype`, in chunks of rows.

        Args:
            index: only this entry of the first dimension (one expert of many).

        Returns:
            A tensor of `tensor.shape`, without its first dimension if `index` is given.

        Raises:
            CheckpointError: a type without a float value (integers), or one the gguf package cannot dequantize; a value
                that is not finite, or does not fit into float16.
        """
        shape = tensor.shape if index is None else tensor.shape[1:]
        num_rows = math.prod(shape[:-1])
        row_bytes = tensor.num_bytes // math.prod(tensor.shape[:-1])
        start = tensor.start + (index or 0) * num_rows * row_bytes
        out = torch.empty(num_rows, shape[-1], dtype=dtype)
        with self.path.open("rb") as file:
            for part in torch.split(out, max(1, _CHUNK_ELEMENTS // shape[-1])):
                data = self._bytes(file, start, len(part) * row_bytes)
                start += len(data)
                rows = np.frombuffer(data, dtype=np.uint8).reshape(len(part), row_bytes)
                part.copy_(self._dequantize(rows, tensor))
                if dtype is torch.float16 and not torch.isfinite(part).all():
                    raise CheckpointError(
                        "a value does not fit into float16",
                        where=f"{self.path}: {tensor.name}",
                        fix="convert to bfloat16 or float32",
                    )
        return out.reshape(shape)

    def _dequantize(self, rows: np.ndarray, tensor: GgufTensor) -> torch.Tensor:
        where = f"{self.path}: {tensor.name}"
        try:
            with np.errstate(all="ignore"):  # what comes of damaged scales is checked here
                # np.array: float32 comes back as a view of read-only bytes, which torch cannot wrap.
                values = np.array(dequantize(rows, tensor.type), dtype=np.float32)
                finite = math.isfinite(float(values.sum(dtype=np.float64)))
        except NotImplementedError as error:
            raise CheckpointError(
                f"the gguf package cannot dequantize {tensor.type.name}",
                where=where,
                fix="pip install --upgrade gguf, or quantize the model to a common type such as Q8_0",
            ) from error
        if not finite:
            raise CheckpointError("the tensor holds NaN or infinite values", where=where, fix=REFETCH)
        return torch.from_numpy(values)
