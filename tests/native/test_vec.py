"""Sixteen numbers at a time, against numpy, on registers of every width."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from native_matrices import from_bf16, pointer, to_bf16
from oarsmith.compiling import CppLibrary
from oarsmith.native.library import SOURCES, flags_of, levels

ALL_HALVES = np.arange(2**16, dtype=np.uint16)


@pytest.fixture(scope="module", params=levels())
def vec(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return CppLibrary(
        name="vec-test",
        what="the functions",
        sources=(Path(__file__).with_name("vec_functions.cpp"),),
        headers=tuple(sorted(SOURCES.glob("*.h"))),
        compile_flags=(*flags_of(request.param), f"-I{SOURCES}"),
    ).load()


def call(function: object, *inputs: np.ndarray, dtype: type = np.float32) -> np.ndarray:
    out = np.zeros(inputs[0].size, dtype)
    function(*map(pointer, inputs), pointer(out), ctypes.c_int64(out.size))  # type: ignore[operator]
    return out


def sweep() -> np.ndarray:
    """Floats of every size and sign, and the special ones."""
    bits = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype=np.uint64).astype(np.uint32)
    special = [
        0.0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        65504,
        65519.99,
        65520,
        6.1e-5,
        6e-8,
        2.9e-8,
        3.4e38,
        1e-45,
        0.5,
        1.5,
        2.5,
    ]
    return np.concatenate([bits.view(np.float32), np.array(special, np.float32)])


def test_exp(vec: ctypes.CDLL) -> None:
    x = np.linspace(-87, 88, 2**16, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(call(vec.vec_exp, x) - exact) / exact).max() < 3e-7
    special = np.array([-np.inf, -100, -87.5, 0, 89, np.inf, np.nan, -0.0] * 2, np.float32)
    found = call(vec.vec_exp, special)[:8]
    assert found[:3].tolist() == [0, 0, 0] and found[3] == found[7] == 1
    assert found[4] == found[5] > 1e38 and np.isnan(found[6])


def test_tanh(vec: ctypes.CDLL) -> None:
    x = np.linspace(-20, 20, 2**16, dtype=np.float32)
    assert np.abs(call(vec.vec_tanh, x) - np.tanh(x.astype(np.float64))).max() < 3e-7
    assert np.isnan(call(vec.vec_tanh, np.full(16, np.nan, np.float32))).all()


def test_bf16(vec: ctypes.CDLL) -> None:
    assert np.array_equal(call(vec.vec_from_bf16, ALL_HALVES), from_bf16(ALL_HALVES), equal_nan=True)
    x = sweep()
    x = x[(np.abs(x) > 1e-37) | ~np.isfinite(x) | (x == 0)]  # below, the CPU's own instruction gives zero
    x = x[: x.size // 16 * 16]
    found, nan = call(vec.vec_to_bf16, x, dtype=np.uint16), np.isnan(x)
    assert np.array_equal(found[~nan], to_bf16(x[~nan]))
    assert np.isnan(from_bf16(found[nan])).all()


@pytest.mark.parametrize("suffix", ["", "_one"])
def test_fp16(vec: ctypes.CDLL, suffix: str) -> None:
    found = call(getattr(vec, f"vec_from_fp16{suffix}"), ALL_HALVES)
    assert np.array_equal(found, ALL_HALVES.view(np.float16).astype(np.float32), equal_nan=True)
    x = sweep()
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    found = call(getattr(vec, f"vec_to_fp16{suffix}"), x, dtype=np.uint16)
    assert np.array_equal(found.view(np.float16), expected, equal_nan=True)


def test_across(vec: ctypes.CDLL) -> None:
    x = np.random.default_rng(0).standard_normal((65, 16), dtype=np.float32)
    found = call(vec.vec_across, x)[: 64 * 3].reshape(64, 3)
    assert np.abs(found[:, 0] - x[:64].sum(1)).max() < 1e-5
    assert np.array_equal(found[:, 1], x[:64].max(1))
    assert np.array_equal(found[:, 2], np.maximum(np.abs(x[:64]).max(1), np.abs(x[1:]).max(1)))
    for bad in (np.nan, np.inf, -np.inf):
        x[3, 7] = bad
        found = call(vec.vec_across, x)[: 64 * 3].reshape(64, 3)
        assert not np.isfinite(found[[2, 3], 2]).any() and np.isfinite(found[4:, 2]).all()


def test_whole_numbers(vec: ctypes.CDLL) -> None:
    x = np.concatenate([np.arange(-64, 64) / 2, np.random.default_rng(0).uniform(-128, 127, 1024)]).astype(np.float32)
    assert np.array_equal(call(vec.vec_round, x, dtype=np.int32), np.rint(x))
    assert np.array_equal(call(vec.vec_bytes, x, dtype=np.int8), np.rint(x))


def test_max_and_min(vec: ctypes.CDLL) -> None:
    """A NaN in the first stays."""
    a, b = np.random.default_rng(0).standard_normal((2, 64), dtype=np.float32)
    a[5] = np.nan
    a[6], b[7] = np.inf, -np.inf
    assert np.array_equal(call(vec.vec_max, a, b), np.maximum(a, b), equal_nan=True)
    assert np.array_equal(call(vec.vec_min, a, b), np.minimum(a, b), equal_nan=True)
