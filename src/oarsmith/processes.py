"""What the environment says of the other processes of a run (torchrun's variables)."""

from __future__ import annotations

import os


def started_by_an_agent() -> bool:
    """Whether this process is one of several that were started together, or alone by the same means."""
    return "RANK" in os.environ


def rank() -> int:
    """Its number among all of them."""
    return _number("RANK", 0)


def is_main() -> bool:
    """Whether it speaks for all."""
    return rank() == 0


def count() -> int:
    """How many were started together."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """Its number among those of its machine."""
    return _number("LOCAL_RANK", 0)


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else otherwise
