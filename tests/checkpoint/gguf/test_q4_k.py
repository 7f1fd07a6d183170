"""Q4_K beside a twin that goes number by number, as llama.cpp's C does: the same bytes."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from oarsmith.checkpoint.gguf.q4_k import BLOCK, Bytes, Floats, encode

F = np.float32


def nearest(value: np.float32) -> int:
    return int(np.rint(value))


def search(x: Floats, weights: Floats, first: float, step: float, count: int) -> tuple[np.float32, np.float32, Floats]:
    """make_qkx2_quants and make_qkx3_quants, for 15 as the largest number."""
    low, high = min(x.min(), F(0)), x.max()
    if high <= low:
        return F(0), -low, np.zeros(32, F)
    sum_w, sum_x = F(0), F(0)
    for k in range(32):
        sum_w, sum_x = sum_w + weights[k], sum_x + weights[k] * x[k]

    def error(numbers: Floats, scale: np.float32, low: np.float32) -> np.float32:
        total = F(0)
        for k in range(32):
            difference = scale * numbers[k] + low - x[k]
            total = total + weights[k] * (difference * difference)
        return total

    inverse = F(15) / (high - low)
    scale, numbers = F(1) / inverse, np.array([min(15, max(0, nearest(inverse * (v - low)))) for v in x], F)
    best = error(numbers, scale, low)
    for index in range(count + 1):
        inverse = (F(first) + F(step) * F(index) + F(15)) / (high - low)
        tried = np.array([min(15, max(0, nearest(inverse * (v - low)))) for v in x], F)
        sum_l, sum_l2, sum_xl = F(0), F(0), F(0)
        for k in range(32):
            product = weights[k] * tried[k]
            sum_l, sum_l2, sum_xl = sum_l + product, sum_l2 + product * tried[k], sum_xl + product * x[k]
        determinant = sum_w * sum_l2 - sum_l * sum_l
        if determinant <= 0:
            continue
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        if new_low > 0:
            new_low, new_scale = F(0), sum_xl / sum_l2
        found = error(tried, new_scale, new_low)
        if found < best:
            best, scale, low, numbers = found, new_scale, new_low, tried
    return scale, -low, numbers


def six_bits(values: Floats, weights: Floats) -> tuple[np.float32, list[int]]:
    """make_qp_quants."""
    largest = max(values.max(), F(0))
    if largest < F(1e-15):
        return F(0), [0] * 8

    def error(scale: np.float32, numbers: list[int]) -> np.float32:
        total = F(0)
        for j in range(8):
            difference = values[j] - scale * F(numbers[j])
            total = total + weights[j] * difference * difference
        return total

    inverse = F(63) / largest
    best = error(F(1) / inverse, [nearest(inverse * v) for v in values])
    for index in (-4, -3, -2, -1, 1, 2, 3, 4):
        tried = (F(0.1) * F(index) + F(63)) / largest
        found = error(F(1) / tried, [min(63, nearest(tried * v)) for v in values])
        if found < best:
            best, inverse = found, tried
    numbers = [min(63, nearest(inverse * v)) for v in values]
    mixed, squares = F(0), F(0)
    for j in range(8):
        mixed = mixed + weights[j] * values[j] * F(numbers[j])
        squares = squares + weights[j] * F(numbers[j]) * F(numbers[j])
    for _ in range(5):
        for j in range(8):
            rest = mixed - weights[j] * values[j] * F(numbers[j])
            rest_squares = squares - weights[j] * F(numbers[j]) * F(numbers[j])
            if rest <= 0 or rest_squares <= 0:
                continue
            new = min(63, nearest(values[j] * rest_squares / rest))
            new_mixed = rest + weights[j] * values[j] * F(new)
            new_squares = rest_squares + weights[j] * F(new) * F(new)
            if new != numbers[j] and new_mixed * new_mixed * squares > mixed * mixed * new_squares:
                numbers[j], mixed, squares = new, new_mixed, new_squares
    return (mixed / squares if squares > 0 else F(0)), numbers


def twin(x: Floats, importance: Floats | None) -> Bytes:
    """A block of 256 to 144 bytes."""
    runs, sums = x.reshape(8, 32), []
    sigma2 = F(0)
    for value in x:
        sigma2 = sigma2 + value * value
    sigma2 = F(2) * sigma2 / F(256)
    found = []
    for j, run in enumerate(runs):
        if importance is None:
            square = F(0)
            for value in run:
                square = square + value * value
            found.append(search(run, np.sqrt(square / F(32)) + np.abs(run), -1.0, 0.1, 20))
            continue
        weights = importance.reshape(8, 32)[j] * np.sqrt(sigma2 + run * run)
        total = F(0)
        for value in weights:
            total = total + value
        sums.append(total)
        found.append(search(run, weights, -0.9, 0.05, 36))
    halves, small = [], []
    for values in (np.array([one[part] for one in found], F) for part in (0, 1)):
        if importance is None:
            largest = values.max() if values.max() > 0 else F(0)
            inverse = F(63) / largest if largest > 0 else F(0)
            halves.append(np.float16(largest / F(63)))
            small.append([min(63, nearest(inverse * value)) for value in values])
        else:
            scale, numbers = six_bits(values, np.array(sums, F))
            halves.append(np.float16(scale))
            small.append(numbers)
    scales, minima = small
    packed = [scales[j] | scales[j + 4] >> 4 << 6 for j in range(4)]
    packed += [minima[j] | minima[j + 4] >> 4 << 6 for j in range(4)]
    packed += [scales[j] & 15 | (minima[j] & 15) << 4 for j in range(4, 8)]
    numbers = []
    for j, run in enumerate(runs):
        step, low = F(halves[0]) * F(scales[j]), F(halves[1]) * F(minima[j])
        if step == 0:
            numbers.append([int(number) for number in found[j][2]])
        else:
            numbers.append([min(15, max(0, nearest((value + low) / step))) for value in run])
    pairs = [numbers[j][k] | numbers[j + 1][k] << 4 for j in range(0, 8, 2) for k in range(32)]
    return np.concatenate([np.array(halves, np.float16).view(np.uint8), np.array(packed + pairs, np.uint8)])


@pytest.mark.parametrize("weighted", [False, True])
def test_the_same_bytes(weighted: bool) -> None:
    random = np.random.default_rng(0)
    rows = (random.standard_normal((5, 2 * BLOCK)) * 0.03).astype(F)
    rows[0, :BLOCK] = 0
    rows[1, :96], rows[1, 96:128] = 0.25, -0.1  # runs of one value
    rows[2], rows[2, 10] = np.abs(rows[2]), 3.0
    rows[3] *= F(1e-7)  # scales that fp16 does not have
    importance = (random.random(2 * BLOCK) ** 4 + 1e-6).astype(F) if weighted else None
    parts = [None, None] if importance is None else [importance[:BLOCK], importance[BLOCK:]]
    with np.errstate(all="ignore"):
        expected = [[twin(row[at * BLOCK : (at + 1) * BLOCK], parts[at]) for at in range(2)] for row in rows]
    assert np.array_equal(encode(rows, importance), np.array(expected).reshape(5, -1))


def test_importance_moves_the_error() -> None:
    """What counts more is met better."""
    random = np.random.default_rng(1)
    rows = random.standard_normal((16, BLOCK)).astype(F)
    importance = np.where(np.arange(BLOCK) % 8 == 0, F(100), F(1))
    plain, weighted = (dequantize(encode(rows, given), GGMLQuantizationType.Q4_K) for given in (None, importance))
    before, after = (((found - rows) ** 2 * importance).sum() for found in (plain, weighted))
    assert after < 0.8 * before
    assert np.sqrt(((plain - rows) ** 2).mean()) < 0.1
