"""Ids of virtual tokens, which stand in front of a document and have no word (see ``part.py``). No PyTorch here."""

from __future__ import annotations


def virtual_ids(count: int) -> list[int]:
    """The ids of a document's virtual tokens, in their order."""
    return [-1 - index for index in range(count)]
