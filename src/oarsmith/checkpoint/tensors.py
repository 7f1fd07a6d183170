"""What every reader of weights offers: names, shapes and dtypes at once, contents one tensor at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from oarsmith.kernels.coded import CodedWeight

FLOATS = {"F64": torch.float32, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def sample_starts(size: int, pieces: int, length: int) -> list[int]:
    """Where the pieces of a sample begin; at 0 alone where a piece after another would be all."""
    if size <= pieces * length:
        return list(range(0, size, length))
    return [piece * (size - length) // (pieces - 1) for piece in range(pieces)]


class TensorSource(ABC):
    """The tensors of a checkpoint under their Hugging Face names. A context manager.

    Everything but the contents is checked when the source is built; building one reads headers only.

    Attributes:
        directory: where they come from, for messages.
        shapes: name -> shape.
        dtypes: name -> safetensors dtype code (``F32``, ``BF16``, ...) of what `read` gives.
    """

    directory: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            CheckpointError: a dtype that PyTorch does not have, or the file has changed meanwhile.
        """

    def read_into(self, name: str, target: Tensor) -> None:
        """Fill ``target``, which has the tensor's number of elements; values are cast to its dtype."""
        target.copy_(self.read(name).view(target.shape))

    def sample(self, name: str, pieces: int, length: int) -> Tensor:
        """Some of a tensor's numbers in order: so many pieces of so many, evenly spread; all of a small one."""
        flat = self.read(name).flatten()
        return torch.cat([flat[start : start + length] for start in sample_starts(len(flat), pieces, length)])

    def coded(self, name: str) -> CodedWeight | None:
        """The tensor as the quantized weight that the files have; None: they have floats, or codes of another kind.

        Raises:
            CheckpointError: as `read`.
        """
        return None

    @abstractmethod
    def close(self) -> None:
        """Let go of the files. Tensors that were read stay valid."""

    def __enter__(self) -> TensorSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def num_bytes(self, name: str) -> int:
        """Size of the tensor that `read` gives, for progress."""
        bits = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "BF16": 16, "F16": 16}.get(self.dtypes[name], 8)
        return math.prod(self.shapes[name]) * bits // 8

    def stored_dtype(self) -> torch.dtype:
        """The floating dtype that holds most elements: a few fp32 buffers do not make an fp32 model."""
        count: Counter[torch.dtype] = Counter()
        for name, code in self.dtypes.items():
            if code in FLOATS:
                count[FLOATS[code]] += math.prod(self.shapes[name])
        if not count:
            return torch.float32
        widest_first = (torch.float32, torch.bfloat16, torch.float16)
        return max(widest_first, key=lambda dtype: count[dtype])
