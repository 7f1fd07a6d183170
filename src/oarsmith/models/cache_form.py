"""How keys and values are kept in 8 bits. No PyTorch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GROUP = 32

HeadScales = tuple[float, ...]
"""A scale for each kv head, or one for all of them."""


@dataclass(frozen=True, kw_only=True)
class CacheForm:
    """Keys and values in 8 bits.

    Attributes:
        code: whole numbers from -127 to 127, or E4M3.
        scales: of each layer's keys and of its values, found before: a number stands for itself times its head's scale,
            and what lies outside becomes the largest. None: whole numbers come in groups of 32 entries of a token with
            an fp16 scale each (Q8_0), E4M3 without a scale.
    """

    code: Literal["int", "e4m3"] = "int"
    scales: tuple[tuple[HeadScales, HeadScales], ...] | None = None

    @property
    def in_groups(self) -> bool:
        """Whether scales come with the numbers."""
        return self.code == "int" and self.scales is None

    def num_bytes(self, dim: int) -> int:
        """Memory of a vector of so many entries."""
        return dim + 2 * -(-dim // GROUP) if self.in_groups else dim


INT8_GROUPS = CacheForm()
"""Whole numbers whose scales come with them."""
