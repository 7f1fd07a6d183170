"""The GGUF file format, written: metadata and tensors, one tensor (or part of one) in memory at a time.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package's own writer keeps every tensor in
memory, or on disk a second time.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGUF_VERSION, GGMLQuantizationType, GGUFValueType
from gguf.quants import quantize
from torch import Tensor

from oarsmith.atomic import atomic_file
from oarsmith.checkpoint.gguf import q4_k
from oarsmith.errors import CheckpointError

_ALIGNMENT = 32
_CHUNK_ELEMENTS = 1 << 22  # 16 MiB of float32: the working set of a quantization, whatever the tensor's size
_SEARCH_ELEMENTS = 1 << 16  # of Q4_K, whose search goes over a chunk many times: twice as fast as 1 << 19
_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


@dataclass(frozen=True)
class GgufInfo:
    """What must be known of a tensor before it is written. `shape` is row-major."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType

    @property
    def row_bytes(self) -> int:
        elements, size = GGML_QUANT_SIZES[self.type]
        assert self.shape[-1] % elements == 0, (self.shape, self.type)
        return self.shape[-1] // elements * size

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _scalar(value: Any) -> tuple[GGUFValueType, bytes]:
    """bool, int (32 bits where it fits), float (32 bits) and str."""
    if isinstance(value, bool):
        return GGUFValueType.BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        if value < 0:
            return GGUFValueType.INT32, struct.pack("<i", value)
        if value < 1 << 32:
            return GGUFValueType.UINT32, struct.pack("<I", value)
        return GGUFValueType.UINT64, struct.pack("<Q", value)
    if isinstance(value, float):
        return GGUFValueType.FLOAT32, struct.pack("<f", value)
    assert isinstance(value, str), value
    return GGUFValueType.STRING, _string(value)


def encode_value(value: Any) -> bytes:
    """Type and content of a metadata value. Lists hold values of one kind; whole numbers in them become int32.

    bytes become an array of uint8.
    """
    if isinstance(value, bytes):
        return struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.UINT8, len(value)) + value
    if not isinstance(value, list):
        kind, data = _scalar(value)
        return struct.pack("<I", kind) + data
    assert value, "an empty list has no type"
    first = value[0]
    if isinstance(first, (bool, str)):
        kind, body = _scalar(first)[0], b"".join(_scalar(item)[1] for item in value)
    elif isinstance(first, int):
        kind, body = GGUFValueType.INT32, np.array(value, dtype="<i4").tobytes()
    else:
        kind, body = GGUFValueType.FLOAT32, np.array(value, dtype="<f4").tobytes()
    return struct.pack("<IIQ", GGUFValueType.ARRAY, kind, len(value)) + body


class GgufWriter(AbstractContextManager["GgufWriter"]):
    """Write one GGUF file, tensors in any order.

    Args:
        path: the file; it appears only when the block ends well and every declared tensor has been written.
        metadata: key -> bool, int, float, str, bytes, or a list of one of the first four.
        tensors: name -> shape and type of everything the file will hold.

    Raises:
        CheckpointError: the disk is full, or a value does not fit into its type.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, GgufInfo]) -> None:
        self._path = path
        self._tensors = dict(tensors)
        self._missing = {name: math.prod(info.shape[:-1]) for name, info in tensors.items()}
        self._starts: dict[str, int] = {}
        header = [b"GGUF", struct.pack("<IQQ", GGUF_VERSION, len(tensors), len(metadata))]
        header += [_string(key) + encode_value(value) for key, value in metadata.items()]
        offset = 0
        for name, info in tensors.items():
            dims = struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *reversed(info.shape))
            header.append(_string(name) + dims + struct.pack("<IQ", info.type, offset))
            self._starts[name] = offset
            offset += -(-info.num_bytes // _ALIGNMENT) * _ALIGNMENT
        text = b"".join(header)
        self._header = text + b"\0" * (-len(text) % _ALIGNMENT)
        self.num_bytes = len(self._header) + offset
        self._stack: AbstractContextManager[BinaryIO] = atomic_file(path, num_bytes=self.num_bytes)
        self._file: BinaryIO | None = None

    def __enter__(self) -> GgufWriter:
        self._file = self._stack.__enter__()
        self._file.write(self._header)
        self._file.truncate(self.num_bytes)
        return self

    def write(self, name: str, tensor: Tensor, *, index: int | None = None, importance_I: Tensor | None = None) -> None:
        """Write a declared tensor, or with `index` one entry of its first dimension. The dtype is free.

        Args:
            importance_I: how much an error in each column counts, for Q4_K; other types have nothing to choose.
        """
        assert self._file is not None, "GgufWriter is used outside its with block"
        info = self._tensors[name]
        shape = info.shape if index is None else info.shape[1:]
        assert tuple(tensor.shape) == shape, (name, tuple(tensor.shape), shape)
        num_rows = math.prod(shape[:-1])
        assert self._missing[name] >= num_rows, f"{name} is written twice"
        self._missing[name] -= num_rows
        self._file.seek(len(self._header) + self._starts[name] + (index or 0) * num_rows * info.row_bytes)
        rows = tensor.detach().cpu().reshape(num_rows, shape[-1])
        elements = _SEARCH_ELEMENTS if info.type is GGMLQuantizationType.Q4_K else _CHUNK_ELEMENTS
        step = max(1, elements // shape[-1])
        for first in range(0, num_rows, step):
            self._file.write(self._encode(name, rows[first : first + step], info.type, importance_I))

    def _encode(self, name: str, rows: Tensor, kind: GGMLQuantizationType, importance_I: Tensor | None) -> bytes:
        if kind in _PLAIN:
            values = rows.to(_PLAIN[kind]).contiguous()
            if kind is GGMLQuantizationType.F16 and rows.dtype is not torch.float16:
                self._require_finite(name, values, "a value does not fit into float16", "write bf16 or f32")
            return values.view(torch.uint8).numpy().tobytes()
        values = rows.float().contiguous()
        self._require_finite(name, values, "a NaN or infinite value cannot be quantized", "write bf16 or f32")
        if kind is GGMLQuantizationType.Q4_K:
            return q4_k.encode(values.numpy(), None if importance_I is None else importance_I.float().numpy()).tobytes()
        return quantize(values.numpy(), kind).tobytes()

    def _require_finite(self, name: str, values: Tensor, what: str, fix: str) -> None:
        if not torch.isfinite(values).all():
            raise CheckpointError(what, where=f"{self._path}: {name}", fix=fix)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        missing = [name for name, rows in self._missing.items() if rows]
        if error is None and missing:
            error = AssertionError(f"declared tensors were never written: {missing[:5]}")
            self._stack.__exit__(type(error), error, None)
            raise error
        self._stack.__exit__(kind, error, traceback)
        self._file = None
