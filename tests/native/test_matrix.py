"""Packed matrices and their products against numpy in fp64, at every level of instructions."""

from __future__ import annotations

import numpy as np
import pytest

from native_matrices import (
    FORMATS,
    Packer,
    check_product,
    from_bf16,
    groups_of,
    normal,
    packed_normal,
    to_bf16,
)

# Not multiples of 32 among them, one row, one column, and sizes that decoders have.
SHAPES = [(1, 1), (5, 7), (31, 33), (32, 32), (33, 95), (64, 576), (100, 131), (96, 1536), (50, 1000), (160, 4864)]
COUNTS = [1, 2, 3, 5, 7, 8, 12, 13, 15, 16, 17, 31, 33, 64, 65, 100, 512]
# Largest error of a weight, as a part of the group's largest (int4: of its range and its largest): half a step, and
# fp16's rounding of scale and low.
WEIGHT_ERROR = {
    "f32": 0.0,
    "bf16": 2.0**-8,
    "int8": 0.5 / 127 + 2.0**-11,
    "int4": 0.5 / 15 + 2.0**-10,
    "e4m3": 16 / 448 + 2.0**-11,
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_weights_are_kept(packer: Packer, format: str, shape: tuple[int, int]) -> None:
    packed, _ = packed_normal(packer, format, *shape)
    weights, found = groups_of(normal(*shape)), groups_of(packed.unpacked())
    size = np.abs(weights).max(2)
    if format == "int4":
        size = size + weights.max(2) - weights.min(2)
    assert (np.abs(found - weights) <= WEIGHT_ERROR[format] * size[:, :, None]).all()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("format", FORMATS)
def test_products(packer: Packer, format: str, count: int) -> None:
    for rows, columns in SHAPES if count <= 33 else SHAPES[3:7]:
        check_product(*packed_normal(packer, format, rows, columns), normal(count, columns, seed=1))


@pytest.mark.parametrize("format", FORMATS)
def test_inputs_larger_than_a_cache(packer: Packer, format: str) -> None:
    """512 rows of 1,536 are computed in chunks of several matrices' blocks; 600 rows in two parts."""
    check_product(*packed_normal(packer, format, 320, 1536), normal(600, 1536, seed=1))


@pytest.mark.parametrize("format", FORMATS)
def test_threads_change_nothing(packer: Packer, format: str) -> None:
    weights, packed = normal(300, 200), []
    packed = [packer.pack(weights, format, threads=threads) for threads in (1, 2, 3, 64)]
    assert all(np.array_equal(one.blocks, packed[0].blocks) for one in packed)
    for count in (1, 5, 40):
        x = normal(count, 200, seed=1)
        outputs = [packed[0].multiply(x, threads) for threads in (1, 2, 3, 64)]
        assert all(np.array_equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("format", FORMATS)
def test_sources(packer: Packer, format: str) -> None:
    """Weights in 16 bits, rows out of others, in another order, with gaps, and rows of zeros."""
    weights = from_bf16(to_bf16(normal(40, 70)))
    whole = packer.pack(weights, format)
    assert np.array_equal(packer.pack(to_bf16(weights), format, source="bf16").blocks, whole.blocks)
    halves = weights.astype(np.float16)
    expected = packer.pack(halves.astype(np.float32), format)
    assert np.array_equal(packer.pack(halves, format, source="f16").blocks, expected.blocks)

    wide = np.full((40, 100), 3.0, np.float32)
    wide[:, :70] = weights
    assert np.array_equal(packer.pack(wide[:, :70], format).blocks, whole.blocks)

    index = [3, -1, 39, 0, 3, *range(30)]
    found, rows = packer.pack(weights, format, index=index).unpacked(), whole.unpacked()
    for place, row in enumerate(index):
        assert np.array_equal(found[place], rows[row] if row >= 0 else np.zeros(70)), place


def test_what_8_bits_hold_is_exact(packer: Packer) -> None:
    """Q8_0: whole numbers up to 127 times an fp16 scale."""
    generator = np.random.default_rng(0)
    whole = generator.integers(-127, 128, (64, 10, 32)).astype(np.float32)
    whole[:, :, 5] = 127 * generator.choice([-1, 1], (64, 10))
    scales = generator.uniform(1e-4, 0.1, (64, 10, 1)).astype(np.float16).astype(np.float32)
    weights = (whole * scales).reshape(64, 320)
    assert np.array_equal(packer.pack(weights, "int8").unpacked(), weights)


def test_what_4_bits_hold_is_exact(packer: Packer) -> None:
    """Q4_1: 0 to 15 times an fp16 scale, and an fp16 low."""
    generator = np.random.default_rng(0)
    whole = generator.integers(0, 16, (64, 10, 32)).astype(np.float32)
    whole[:, :, 3], whole[:, :, 17] = 0, 15
    scales = generator.uniform(1e-3, 0.1, (64, 10, 1)).astype(np.float16).astype(np.float32)
    lows = generator.uniform(-1, 0.2, (64, 10, 1)).astype(np.float16).astype(np.float32)
    weights = (whole * scales + lows).reshape(64, 320)
    assert np.array_equal(packer.pack(weights, "int4").unpacked(), weights)


@pytest.mark.parametrize("most", range(8, 16))
def test_4_bits_that_are_not_all_used_are_exact(packer: Packer, most: int) -> None:
    """Q4_0: -8 to 7 times an fp16 scale of either sign, of which -8 is always there and 7 is not."""
    generator = np.random.default_rng(most)
    whole = generator.integers(0, most + 1, (64, 10, 32)).astype(np.float32) - 8
    whole[:, :, 9], whole[:, :, 20] = -8, most - 8
    scales = generator.uniform(1e-3, 0.1, (64, 10, 1)) * generator.choice([-1, 1], (64, 10, 1))
    weights = (whole * scales.astype(np.float16).astype(np.float32)).reshape(64, 320)
    assert np.array_equal(packer.pack(weights, "int4").unpacked(), weights)
    lost = from_bf16(to_bf16(weights))
    assert np.abs(packer.pack(lost, "int4").unpacked() - weights).max() < np.abs(weights).max() * 2.0**-8


@pytest.mark.parametrize("count", [1, 4, 16, 70])
@pytest.mark.parametrize("format", FORMATS)
def test_whole_numbers_are_exact(packer: Packer, format: str, count: int) -> None:
    """Small ones are hardly rounded anywhere: products that are off by a hundredth are wrong."""
    generator = np.random.default_rng(2)
    weights = generator.integers(-7, 9, (70, 96)).astype(np.float32)
    x = generator.integers(-127, 128, (count, 96)).astype(np.float32)
    if format == "int8":
        weights[:, ::32] = 127
    if format == "int4":
        weights[:, ::32], weights[:, 1::32] = -7, 8
    if format == "e4m3":
        weights[weights == 8] = weights[:, ::32] = 7
    x[:, ::32] = 127
    assert np.abs(packer.pack(weights, format).multiply(x) - x @ weights.T).max() < 0.01


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 3e4, 1e30])
def test_inputs_of_any_size(packer: Packer, format: str, size: float) -> None:
    packed, weights = packed_normal(packer, format, 33, 95)
    for count in (1, 3, 20, 70):
        check_product(packed, weights, normal(count, 95, seed=1) * np.float32(size))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 1000.0])
def test_constant_weights(packer: Packer, format: str, value: float) -> None:
    packed = packer.pack(np.full((40, 50), value, np.float32), format)
    assert np.abs(packed.unpacked() - value).max() <= abs(value) * 2.0**-8
    for count in (1, 20, 70):
        check_product(packed, packed.unpacked().astype(np.float64), normal(count, 50, seed=1))


@pytest.mark.parametrize("format", FORMATS)
def test_inputs_of_zero(packer: Packer, format: str) -> None:
    packed, _ = packed_normal(packer, format, 33, 95)
    for count in (1, 20, 70):
        assert not packed.multiply(np.zeros((count, 95), np.float32)).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("count", [1, 3, 16, 70])
@pytest.mark.parametrize("format", FORMATS)
def test_inputs_that_are_not_finite(packer: Packer, format: str, count: int, bad: float) -> None:
    """Their row says so, and the others do not feel it."""
    packed, _ = packed_normal(packer, format, 33, 95)
    x = normal(count, 95, seed=1)
    before = packed.multiply(x)
    x[count // 2, 40] = bad
    after = packed.multiply(x)
    assert not np.isfinite(after[count // 2]).any()
    others = np.arange(count) != count // 2
    assert np.array_equal(after[others], before[others])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("format", FORMATS)
def test_weights_that_are_not_finite(packer: Packer, format: str, bad: float) -> None:
    weights = normal(40, 95)
    clean = packer.pack(weights, format)
    weights[21, 40] = bad
    packed = packer.pack(weights, format)
    assert not np.isfinite(packed.row(21)[40])
    others = np.arange(40) != 21
    for count in (1, 3, 16, 70):
        x = normal(count, 95, seed=1)
        found, expected = packed.multiply(x), clean.multiply(x)
        assert not np.isfinite(found[:, 21]).any()
        assert np.array_equal(found[:, others], expected[:, others])


def test_weights_too_large_for_a_scale(packer: Packer) -> None:
    """fp16 ends at 65,504: the output is not finite, rather than wrong."""
    weights = np.full((32, 32), 1e30, np.float32)
    weights[:, ::2] = -1e30
    for format in ("int8", "int4"):
        assert not np.isfinite(packer.pack(weights, format).multiply(normal(3, 32))).any()
