"""Reading back what was written: names, shapes, dtypes and hashes of all tensors, before success is said."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from oarsmith.checkpoint.paddle.source import is_paddle, open_paddle_files
from oarsmith.checkpoint.safetensors_stream import SAFETENSORS_DTYPES
from oarsmith.checkpoint.source import open_source
from oarsmith.checkpoint.tensors import TensorSource
from oarsmith.errors import CheckpointError


class Digests:
    """dtype, shape and SHA-256 of each tensor that was meant to be written."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[str, tuple[int, ...], str]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        self.known[name] = SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape), digest(tensor)


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's values in memory order."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data if flat.numel() else b"").hexdigest()


def check_written(
    folder: Path, digests: Digests, total: int, progress: Callable[[str, int, int], None] | None = None
) -> None:
    """Read a model directory's tensors from disk again and compare them with what was meant.

    Raises:
        CheckpointError: a tensor is missing, surplus or differs, with its name.
    """
    opened = open_paddle_files(folder).only if is_paddle(folder) else open_source(folder)
    with opened as source:
        compare(source, digests, total, progress)


def compare(
    source: TensorSource, digests: Digests, total: int, progress: Callable[[str, int, int], None] | None = None
) -> None:
    """As `check_written`, for a source that is open."""
    odd = sorted(set(source.shapes) ^ set(digests.known))
    if odd:
        raise _damage(source, odd[0], "is missing" if odd[0] in digests.known else "was not meant to be there")
    done = 0
    for name, (code, shape, expected) in digests.known.items():
        if (source.dtypes[name], source.shapes[name]) != (code, shape):
            raise _damage(source, name, f"is {source.dtypes[name]} {source.shapes[name]}, not {code} {shape}")
        tensor = source.read(name)
        if digest(tensor) != expected:
            raise _damage(source, name, "has other values than were written")
        done += tensor.numel() * tensor.element_size()
        if progress is not None:
            progress("verifying", done, total)


def _damage(source: TensorSource, name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"read back after writing, tensor {name} {what}",
        where=str(source.directory),
        fix="check the disk and its file system, then convert again",
    )
