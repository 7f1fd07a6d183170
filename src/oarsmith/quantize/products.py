"""How exactly matrices are multiplied while a model is quantized."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def products(*, exact: bool) -> Iterator[None]:
    """Products of fp32 matrices: exact, or from factors rounded to bf16, with fp32 sums, where the CPU has such.

    The latter are 4 times as fast. An average over thousands of tokens is as good with them, and whole numbers up to
    256 are exact in bf16.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if exact else "medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
