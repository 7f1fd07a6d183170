"""Bits chosen under a budget."""

from __future__ import annotations

import itertools

import pytest

from oarsmith.quantize.budget import LayerCosts, choose_bits


def layers(seed: int, count: int = 4) -> list[LayerCosts]:
    return [
        LayerCosts({bits: (1 + (seed * 7 + at * 5) % 11) / 4.0**bits for bits in (2, 3, 4, 8)}, 100 + 30 * at)
        for at in range(count)
    ]


def size(costs: list[LayerCosts], bits: tuple[int, ...] | list[int]) -> int:
    return sum(layer.numel * count for layer, count in zip(costs, bits, strict=True))


def cost(costs: list[LayerCosts], bits: tuple[int, ...] | list[int]) -> float:
    return sum(layer.kl[count] for layer, count in zip(costs, bits, strict=True))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", [0.5, 0.1, 0.03, 0.003])
def test_within_the_budget_and_near_the_smallest(seed: int, budget: float) -> None:
    costs = layers(seed)
    found = choose_bits(costs, budget)
    assert cost(costs, found) <= budget
    every = itertools.product((2, 3, 4, 8), repeat=len(costs))
    best = min(size(costs, bits) for bits in every if cost(costs, bits) <= budget)
    # Greedy: at most a step of a layer more.
    assert size(costs, found) <= best + 4 * max(layer.numel for layer in costs)


def test_nothing_is_enough() -> None:
    assert choose_bits(layers(0), 0.0) == [8] * 4
    assert choose_bits(layers(0), 1e9) == [2] * 4


def test_a_cost_that_does_not_fall_is_no_reason_for_bits() -> None:
    costs = [LayerCosts({2: 0.1, 4: 0.1, 8: 0.0}, 10), LayerCosts({2: 0.0, 4: 0.0, 8: 0.0}, 10)]
    assert choose_bits(costs, 0.05) == [8, 2]
