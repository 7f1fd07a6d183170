"""Byte ranges of files as tensors."""

from __future__ import annotations

from contextlib import ExitStack
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from oarsmith.errors import CheckpointError


class RangeReader:
    """Byte ranges of several files, read into memory of their own.

    Tensors are read, not mapped: the pages of a mapping count as this process's memory until it is closed, so that a
    model would be held twice while loading.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._open: dict[Path, FileIO] = {}

    def close(self) -> None:
        self._open.clear()
        self._stack.close()

    def read(self, path: Path, start: int, num_bytes: int) -> Tensor:
        """``num_bytes`` bytes (uint8) from ``start``."""
        data = torch.empty(num_bytes, dtype=torch.uint8)
        self.fill(path, start, data)
        return data

    def fill(self, path: Path, start: int, target: Tensor) -> None:
        """Read straight into a contiguous CPU tensor's memory.

        Raises:
            CheckpointError: the file ends early.
        """
        if path not in self._open:
            self._open[path] = self._stack.enter_context(path.open("rb", buffering=0))
        file, done = self._open[path], 0
        view = target.detach().reshape(-1).view(torch.uint8).numpy().data
        file.seek(start)
        while done < len(view):  # one call reads 2 GB at most
            count = file.readinto(view[done:])
            if not count:
                raise CheckpointError("the file ends early", where=str(path), fix="copy the file again")
            done += count
