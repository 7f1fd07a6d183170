"""Shifted sparse attention for training on long documents (S2-Attn of LongLoRA, Chen et al. 2024, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from oarsmith.errors import ModelError
from oarsmith.models.layout import Layout, Span
from oarsmith.models.spec import DecoderSpec


@dataclass(frozen=True)
class ShiftedSparse:
    """Half of the heads attend within groups of a document's tokens, the others within groups shifted by half a group.

    The authors roll the tokens by half a group, so that the document's last half group and its first one make a group
    of their own; its causal mask follows the rolled order, in which the *last* tokens come first: the first half group
    then sees the future. Here nothing wraps around: the first and the last half group are groups by themselves. A
    document without whole groups has a shorter last one. With an odd number of heads the shifted half has one more.

    Args:
        ratio: length of a group as a share of its document's.
    """

    ratio: float = 0.25

    def __post_init__(self) -> None:
        assert 0 < self.ratio <= 1, self.ratio

    @staticmethod
    def require(spec: DecoderSpec) -> None:
        """Refuse models whose heads have no halves.

        Raises:
            ModelError: an attention with a single head.
        """
        if min(layer.attention.num_heads for layer in spec.layers) < 2:
            raise ModelError(
                "shifted sparse attention needs two heads or more: the model's attention has one",
                where="use_ssa",
                fix="set use_ssa to false",
            )

    def apply(self, layout: Layout) -> Layout:
        """``layout`` with the spans of both halves of the heads."""
        assert layout.fresh, "shifted sparse attention is for training; a cache continues documents"
        straight: list[Span] = []
        shifted: list[Span] = []
        for span in layout.spans:
            length = span.q_stop - span.q_start
            size = max(1, math.ceil(length * self.ratio))
            straight += _groups(span, range(0, length, size))
            shifted += _groups(span, [0, *range(size // 2 or size, length, size)])
        return replace(layout, halves=(tuple(straight), tuple(shifted)))


def _groups(span: Span, starts: range | list[int]) -> Iterator[Span]:
    """The span in groups that begin at ``starts``; each sees its own part of the prefix."""
    assert (span.q_start, span.q_stop) == (span.k_start, span.k_stop), span
    for a, b in pairwise([*starts, span.q_stop - span.q_start]):
        begin, end = span.q_start + a, span.q_start + b
        yield Span(begin, end, begin, end, min(max(span.prefix - a, 0), b - a))
