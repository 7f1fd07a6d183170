"""The memory that a program's weights lie in: one run of bytes in pages of 2 MB, where the system has those."""

from __future__ import annotations

import ctypes
import mmap
import sys

_ALIGNMENT = 64


class Arena:
    """``size`` bytes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.memory = mmap.mmap(-1, max(size, 1))
        if sys.platform == "linux":
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))


class Plan:
    """Hands out places in an arena before it exists."""

    def __init__(self) -> None:
        self.size = 0

    def take(self, size: int) -> int:
        """The offset of ``size`` more bytes."""
        offset = self.size
        self.size = -(-(offset + size) // _ALIGNMENT) * _ALIGNMENT
        return offset
