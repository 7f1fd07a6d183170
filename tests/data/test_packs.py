"""Packing: complete, within capacity, close to the bound, and the same every time."""

from __future__ import annotations

import random

from oarsmith.data.packs import best_fit_packs, greedy_packs, packing_efficiency


def plain_best_fit(lengths, capacity):
    """Best-fit decreasing by trying every pack: the slow twin."""
    packs, free = [], []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [p for p in range(len(packs)) if free[p] >= lengths[index]]
        if not fitting:
            packs.append([])
            free.append(capacity)
            fitting = [len(packs) - 1]
        best = min(fitting, key=lambda p: free[p])
        packs[best].append(index)
        free[best] -= lengths[index]
    return packs


def test_packs_hold_every_sample_once_and_never_more_than_the_capacity():
    rng = random.Random(0)
    for _ in range(200):
        capacity = rng.randint(1, 300)
        lengths = [rng.randint(1, capacity) for _ in range(rng.randint(0, 80))]
        packs = best_fit_packs(lengths, capacity)
        assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
        filled = [sum(lengths[index] for index in pack) for pack in packs]
        assert all(0 < total <= capacity for total in filled)
        assert len(packs) <= 11 / 9 * -(-sum(lengths) // capacity) * 1.5 + 1
        assert packs == best_fit_packs(lengths, capacity)
        slow = plain_best_fit(lengths, capacity)
        # Among equally full packs the two may choose differently; how full packs become is the same.
        assert sorted(filled) == sorted(sum(lengths[index] for index in pack) for pack in slow)


def test_edges():
    assert best_fit_packs([], 8) == [] and packing_efficiency([], [], 8) == 0
    assert best_fit_packs([8, 8], 8) == [[0], [1]]
    assert greedy_packs([5, 4, 3, 4], 8) == [[0, 2], [1, 3]]
    assert packing_efficiency([5, 4, 3, 4], greedy_packs([5, 4, 3, 4], 8), 8) == 1.0


def test_chat_like_lengths_fill_the_packs():
    rng = random.Random(1)
    lengths = [min(2048, max(8, int(rng.lognormvariate(5.2, 0.8)))) for _ in range(20_000)]
    assert packing_efficiency(lengths, best_fit_packs(lengths, 2048), 2048) > 0.995
