"""The tensors of a GGUF file, or of all parts of a split one, dequantized a chunk at a time.

Headers are read here, block formats are the `gguf` package's.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from gguf.quants import dequantize

from oarsmith.checkpoint.files import REFETCH
from oarsmith.checkpoint.gguf.header import GgufTensor, read_header
from oarsmith.errors import CheckpointError

__all__ = ["GgufFile", "GgufTensor"]

_CHUNK_ELEMENTS = 1 << 22  # 16 MiB of float32: the working set of a dequantization, whatever the tensor's size
_PART = re.compile(r"(?P<stem>.*)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


class GgufFile:
    """A GGUF file whose header, metadata and tensor ranges have been checked.

    Of a model split into ``NAME-00001-of-0000N.gguf`` and so on the first part stands for all.

    Attributes:
        metadata: key -> number, bool, string or list.
        tensors: name -> `GgufTensor`, in file order.

    Raises:
        CheckpointError: what `read_header` raises; a missing part, or another part than the first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata, self.tensors = read_header(path)
        count = self.metadata.get("split.count", 0)
        if count not in (0, 1):
            self._add_parts(count)

    def _add_parts(self, count: object) -> None:
        where = f"{self.path}: split.count"
        match = _PART.fullmatch(self.path.name)
        if type(count) is not int or not 1 < count < 100_000 or match is None or int(match["count"]) != count:
            raise CheckpointError(
                f"this is one of {count} parts, but it is not named NAME-00001-of-{count:>05}.gguf",
                where=where,
                fix="give the parts the names they were released under",
            )
        if int(match["index"]) != 1 or self.metadata.get("split.no", 0) != 0:
            first = self.path.with_name(f"{match['stem']}-00001-of-{count:05}.gguf")
            raise CheckpointError(f"this is not the first of {count} parts", where=where, fix=f"name {first}")
        for index in range(2, count + 1):
            part = self.path.with_name(f"{match['stem']}-{index:05}-of-{count:05}.gguf")
            metadata, tensors = read_header(part)
            if metadata.get("split.no") != index - 1 or metadata.get("split.count") != count:
                raise CheckpointError(f"this is not part {index} of {count}", where=str(part), fix=REFETCH)
            if twice := tensors.keys() & self.tensors.keys():
                raise CheckpointError("the tensor lies in two parts", where=f"{part}: {min(twice)}", fix=REFETCH)
            self.tensors |= tensors

    def same_bytes(self, first: GgufTensor, second: GgufTensor) -> bool:
        """Whether two tensors are the same bytes."""
        if first.num_bytes != second.num_bytes:
            return False
        with first.path.open("rb") as one, second.path.open("rb") as other:
            return all(
                self._bytes(one, first.start + at, min(_CHUNK_ELEMENTS, first.num_bytes - at))
                == self._bytes(other, second.start + at, min(_CHUNK_ELEMENTS, first.num_bytes - at))
                for at in range(0, first.num_bytes, _CHUNK_ELEMENTS)
            )

    def _bytes(self, file: BinaryIO, start: int, count: int) -> bytes:
        """Read, not mapped: pages of a mapping would count as this process's memory until it is closed."""
        file.seek(start)
        data = file.read(count)
        if len(data) != count:
            raise CheckpointError("the file has become shorter while it was read", where=file.name, fix=REFETCH)
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
        with tensor.path.open("rb") as file:
            for part in torch.split(out, max(1, _CHUNK_ELEMENTS // shape[-1])):
                data = self._bytes(file, start, len(part) * row_bytes)
                start += len(data)
                rows = np.frombuffer(data, dtype=np.uint8).reshape(len(part), row_bytes)
                part.copy_(self._dequantize(rows, tensor))
                if dtype is torch.float16 and not torch.isfinite(part).all():
                    raise CheckpointError(
                        "a value does not fit into float16",
                        where=f"{tensor.path}: {tensor.name}",
                        fix="convert to bfloat16 or float32",
                    )
        return out.reshape(shape)

    def _dequantize(self, rows: np.ndarray, tensor: GgufTensor) -> torch.Tensor:
        where = f"{tensor.path}: {tensor.name}"
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
