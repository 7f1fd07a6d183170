"""Packing samples into rows of limited length without splitting any."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence


def best_fit_packs(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: every sample, longest first, goes to the pack it leaves the least room in.

    O(n log n + n * distinct free sizes) with a memory move for the second term; deterministic: equal lengths are
    taken in the given order, among equally full packs the oldest. Needs at most 11/9 of the optimal number of packs
    plus 1 (Johnson, 1973).

    Args:
        lengths: tokens of each sample, each from 1 to `capacity`.
        capacity: tokens of a pack.

    Returns:
        packs as lists of indices into `lengths`; every index is in exactly one.
    """
    packs: list[list[int]] = []
    open_packs: dict[int, deque[int]] = {}  # free tokens -> packs, oldest first
    free_sizes: list[int] = []  # keys of open_packs, ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        assert 0 < length <= capacity, f"sample {index} has {length} tokens, a pack {capacity}"
        at = bisect_left(free_sizes, length)
        if at == len(free_sizes):
            free, pack = capacity, len(packs)
            packs.append([])
        else:
            free = free_sizes[at]
            pack = open_packs[free].popleft()
            if not open_packs[free]:
                del open_packs[free], free_sizes[at]
        packs[pack].append(index)
        free -= length
        if free > 0:
            if free not in open_packs:
                open_packs[free] = deque()
                insort(free_sizes, free)
            open_packs[free].append(pack)
    return packs


greedy_packs = best_fit_packs
"""What `greedy_zero_padding` means here. PaddleNLP's own is worst fit over a buffer of 500 samples, which leaves more
room unused."""


def packing_efficiency(lengths: Sequence[int], packs: Sequence[Sequence[int]], capacity: int) -> float:
    """Share of the packs' capacity that is filled, 0 to 1 (0 where there are no packs)."""
    return sum(lengths) / (len(packs) * capacity) if packs else 0.0
