"""Safetensors files as a source of tensors: ``model.safetensors`` or its shards."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from oarsmith.checkpoint.files import check_shard, read_shards, require_inside
from oarsmith.checkpoint.ranges import RangeReader
from oarsmith.checkpoint.safetensors_stream import SAFETENSORS_DTYPES, StoredTensor, check_safetensors
from oarsmith.checkpoint.tensors import TensorSource, sample_starts
from oarsmith.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_CAST_BYTES = 4_000_000  # read at a time where values are cast
_TORCH = {code: dtype for dtype, code in SAFETENSORS_DTYPES.items()}


class SafetensorsSource(TensorSource):
    """The tensors of one file or of the shards of an index.

    Every file is checked before a tensor is trusted (header, ranges, length).

    Args:
        path: a safetensors file, or an index of shards.

    Raises:
        CheckpointError: a missing or damaged file, an index that points outside or does not tell the truth.
    """

    def __init__(self, path: Path) -> None:
        self.directory = path.parent
        self.shapes, self.dtypes = {}, {}
        self._stored: dict[str, tuple[Path, StoredTensor]] = {}
        self._reader = RangeReader()
        shards = read_shards(path) if path.suffix == ".json" else {path.name: []}
        for file, promised in shards.items():
            shard = require_inside(self.directory, self.directory / file)
            found = check_safetensors(shard)
            check_shard(path, shard, promised, set(found), set(self.shapes))
            for name, info in found.items():
                self.shapes[name], self.dtypes[name], self._stored[name] = info.shape, info.dtype, (shard, info)

    def read(self, name: str) -> Tensor:
        path, stored = self._stored[name]
        if stored.dtype not in _TORCH:
            raise CheckpointError(f"dtype {stored.dtype} cannot be read", where=f"{path}: {name}")
        data = self._reader.read(path, stored.start, stored.end - stored.start)
        return data.view(_TORCH[stored.dtype]).reshape(stored.shape)

    def read_into(self, name: str, target: Tensor) -> None:
        path, stored = self._stored[name]
        dtype = _TORCH.get(stored.dtype)
        if dtype is None or not target.is_contiguous() or target.device.type != "cpu" or not target.numel():
            super().read_into(name, target)
        elif target.dtype == dtype:
            self._reader.fill(path, stored.start, target)  # no second copy, not even of one tensor
        else:
            flat, step = target.view(-1), _CAST_BYTES // dtype.itemsize
            scratch = torch.empty(min(step, flat.numel()), dtype=dtype)
            for start in range(0, flat.numel(), step):
                part = scratch[: min(step, flat.numel() - start)]
                self._reader.fill(path, stored.start + start * dtype.itemsize, part)
                flat[start : start + step].copy_(part)

    def sample(self, name: str, pieces: int, length: int) -> Tensor:
        path, stored = self._stored[name]
        if (dtype := _TORCH.get(stored.dtype)) is None:
            return super().sample(name, pieces, length)
        size, width = (stored.end - stored.start) // dtype.itemsize, dtype.itemsize
        starts = sample_starts(size, pieces, length)
        parts = [
            self._reader.read(path, stored.start + start * width, min(length, size - start) * width) for start in starts
        ]
        return torch.cat(parts).view(dtype) if parts else torch.empty(0, dtype=dtype)

    def close(self) -> None:
        self._reader.close()
