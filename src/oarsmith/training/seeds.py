"""Random numbers keyed by what they are for, so that a resumed run draws the same ones."""

from __future__ import annotations

import zlib

import torch


def keyed_seed(seed: int, purpose: str, index: int) -> int:
    """A seed for PyTorch's generators, one for each (seed, purpose, index)."""
    return zlib.crc32(f"{seed}/{purpose}/{index}".encode()) + (seed << 32) % (1 << 62)


def seed_pass(step_seed: int, index: int) -> None:
    """Key PyTorch's global generator by a step (``torch.initial_seed()`` when it began) and one of its passes.

    The first pass goes on as the step began. So a pass draws the same numbers in whichever process it runs.
    """
    if index:
        torch.manual_seed(keyed_seed(step_seed % (1 << 32), "pass", index))


def seed_step(seed: int, purpose: str, step: int) -> None:
    """Key PyTorch's global generator (dropout) by (seed, purpose, step)."""
    torch.manual_seed(keyed_seed(seed, purpose, step))
