"""Packed matrices and their products against numpy in fp64."""

from __future__ import annotations

import numpy as np
import pytest

from native_matrices import FORMATS, Packed, Packer

# Not multiples of 32 among them, one row, one column, and sizes that decoders have.
SHAPES = [(1, 1), (5, 7), (31, 33), (32, 32), (33, 95), (64, 576), (100, 131), (96, 1536), (50, 1000), (160, 4864)]
COUNTS = [1, 2, 3, 7, 8, 15, 16, 17, 33, 64, 100, 512]
# Largest error of a weight, as a part of the group's largest (int4: of its range): half a step, and fp16's rounding of
# scale and low.
WEIGHT_ERROR = {"f32": 0.0, "bf16": 2.0**-8, "int8": 0.5 / 127 + 2.0**-11, "int4": 0.5 / 15 + 2.0**-10}
# Of an activation, as a part of the largest of its group of 32: half a step of int8, or of bf16.
INPUT_ERROR = {"f32": 2.0**-24, "bf16": 2.0**-8, "int8": 0.5 / 127, "int4": 0.5 / 127}


def made(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def groups_of(x: np.ndarray) -> np.ndarray:
    """[rows, groups, 32], with zeros up to 32."""
    return np.pad(x, ((0, 0), (0, -x.shape[1] % 32))).reshape(x.shape[0], -1, 32)


def check_product(packed: Packed, x: np.ndarray, threads: int = 1) -> None:
    """Against what the packed weights stand for: no output is off by more than its inputs' errors allow."""
    weights = packed.unpacked().astype(np.float64)
    expected = x.astype(np.float64) @ weights.T
    found = packed.multiply(x, threads)
    largest = np.repeat(np.abs(groups_of(x)).max(2), 32, 1)[:, : x.shape[1]]
    # Errors are independent and of either sign: their sum grows as the root of their squares. 6 of these at most.
    one = np.sqrt((largest.astype(np.float64) ** 2) @ (weights**2).T)
    allowed = 6 * one * (INPUT_ERROR[packed.format] + WEIGHT_ERROR["bf16"] * (packed.format != "f32") + 2.0**-20)
    assert (np.abs(found - expected) <= allowed + 1e-30).all(), np.abs((found - expected) / (allowed + 1e-30)).max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_weights_are_kept(packer: Packer, format: str, shape: tuple[int, int]) -> None:
    weights = made(*shape)
    found = groups_of(packer.pack(weights, format).unpacked())
    weights = groups_of(weights)
    if format == "int4":
        # The low is rounded, by a part of itself, and the scale's error counts up to 15 times.
        size = weights.max(2) - weights.min(2) + np.abs(weights).max(2)
    else:
        size = np.abs(weights).max(2)
    assert (np.abs(found - weights) <= WEIGHT_ERROR[format] * size[:, :, None]).all()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("format", FORMATS)
def test_products(packer: Packer, format: str, count: int) -> None:
    for rows, columns in SHAPES:
        check_product(packer.pack(made(rows, columns), format), made(count, columns, seed=1))
