"""8-bit linear maps: the kernels beside their twins, and beside the map they stand for in fp64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from oarsmith.kernels import int8
from oarsmith.kernels.int8 import (
    Int8Weight,
    dequantize_rows,
    dequantize_rows_reference,
    int8_linear,
    quantize_rows,
    quantize_rows_reference,
    quantize_weight,
    rotate,
    rotation_size,
)
from oarsmith.kernels.select import using

from .conftest import randn

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (3, 7), (5, 12), (9, 96), (0, 8), (70, 576)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_columns", [False, True])
def test_quantize_rows(native: None, shape: tuple[int, int], dtype: torch.dtype, with_columns: bool) -> None:
    x = randn(*shape, dtype=dtype)
    columns = randn(shape[1], seed=1).abs() if with_columns else None
    for rotation in {1, rotation_size(shape[1])}:
        values, scale = quantize_rows(x, columns=columns, rotation=rotation)
        expected, expected_scale = quantize_rows_reference(x, columns=columns, rotation=rotation)
        # fp32 sums in another order: a number on a border may round to the neighbour.
        assert (values.int() - expected.int()).abs().max().item() <= 1 if x.numel() else not values.numel()
        assert (values != expected).float().mean().nan_to_num() < 0.01
        torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
        assert values.abs().max() == 127 if x.numel() else True


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_rows(native: None, shape: tuple[int, int], dtype: torch.dtype) -> None:
    sums = torch.randint(-(2**20), 2**20, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(2))
    scale, columns, bias = randn(shape[0]).abs() * 1e-3, randn(shape[1], seed=1), randn(shape[1], seed=3)
    settings = (
        {"columns": columns},
        {"columns": columns, "bias": bias},
        {"bias": bias},
        {"rotation": rotation_size(shape[1])},
    )
    for setting in settings:
        out = torch.empty(shape, dtype=dtype)
        dequantize_rows(sums, scale, out, **setting)
        expected = dequantize_rows_reference(sums, scale, **setting)
        # fp32: another order of operations; bf16: one rounding.
        limit = 1e-5 if dtype == torch.float32 else 2**-8
        size = expected.abs().max().item() if sums.numel() else 1.0
        torch.testing.assert_close(out.float(), expected, rtol=limit, atol=1e-5 * size)


@pytest.mark.parametrize("dim", [1, 6, 12, 31, 64, 576])
def test_rotation_is_a_hadamard_matrix_and_its_own_inverse(dim: int) -> None:
    size = rotation_size(dim)
    assert dim % size == 0 and (size == 32 or dim % (2 * size) != 0)
    matrix = rotate(torch.eye(dim, dtype=torch.float64), size)
    torch.testing.assert_close(matrix @ matrix, torch.eye(dim, dtype=torch.float64))
    torch.testing.assert_close(matrix, matrix.t())
    entries = matrix[matrix != 0].abs()
    assert len(entries) == dim * size and (entries - size**-0.5).abs().max() < 1e-12
    first_column = matrix[:, 0].nonzero()[:, 0]
    assert torch.equal(first_column, torch.arange(0, dim, dim // size))


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "inner", "outer"), [(1, 8, 3), (7, 33, 5), (3, 48, 31), (1100, 64, 40)])
def test_int8_linear(native: None, backend: str, dtype: torch.dtype, tokens: int, inner: int, outer: int) -> None:
    """Values and gradients of the map; 1,100 tokens are three pieces."""
    x, w, bias = randn(tokens, inner, dtype=dtype), randn(outer, inner, dtype=dtype, seed=1), randn(outer, seed=2)
    dout = randn(tokens, outer, dtype=dtype, seed=3)
    with using(backend):  # type: ignore[arg-type]
        x.requires_grad_()
        out = int8_linear(x, quantize_weight(w), bias)
        (dx,) = torch.autograd.grad(out, x, dout)
    assert out.dtype == dx.dtype == dtype
    exact, exact_dx = x.detach().double() @ w.double().t() + bias.double(), dout.double() @ w.double()
    # Each factor is off by up to half a 127th of its row's largest entry: about 1 % of a typical entry each.
    for found, expected in ((out.detach(), exact), (dx, exact_dx)):
        assert (found.double() - expected).norm() < 0.03 * expected.norm()


def test_gradient_is_that_of_the_rounded_map(native: None) -> None:
    """dx is dy times the W that forward used, up to the rounding of dy."""
    w = quantize_weight(randn(96, 64, seed=1))
    x, dout = randn(20, 64).requires_grad_(), randn(20, 96, seed=3)
    (dx,) = torch.autograd.grad(int8_linear(x, w), x, dout)
    rounded = rotate(w.values_OI.double() * w.scale_O[:, None].double(), rotation_size(64))
    expected = dout.double() @ rounded
    assert (dx.double() - expected).norm() < 0.012 * expected.norm()


def test_outliers_do_not_spoil_a_row(native: None) -> None:
    """One entry 50 times the others: without the rotation most of a row would round to nothing."""
    x, w = randn(16, 576), randn(64, 576, seed=1)
    x[:, 7] *= 50
    w[:, 7] = 0  # so that what is left to see is the other entries
    exact = x @ w.t()
    with_rotation = int8_linear(x, quantize_weight(w))
    values, scale = quantize_rows(x)
    without = (values.float() * scale[:, None]) @ w.t()
    error, plain = (with_rotation - exact).norm() / exact.norm(), (without - exact).norm() / exact.norm()
    assert plain > 0.1 and error < plain / 2.5


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_seen(native: None, backend: str, bad: float) -> None:
    x, w = randn(5, 40), quantize_weight(randn(24, 40, seed=1))
    x[2, 3] = bad
    with using(backend):  # type: ignore[arg-type]
        out = int8_linear(x, w)
    assert out[2].isnan().all()
    assert torch.cat((out[:2], out[3:])).isfinite().all()


def test_rows_of_zeros(native: None) -> None:
    out = int8_linear(torch.zeros(3, 16), quantize_weight(torch.zeros(4, 16)))
    assert torch.equal(out, torch.zeros(3, 4))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_matter(native: None, threads: int) -> None:
    x, w = randn(200, 96, dtype=torch.bfloat16), quantize_weight(randn(256, 96, seed=1))
    alone = int8_linear(x, w)
    torch.set_num_threads(threads)
    assert torch.equal(alone, int8_linear(x, w))


def test_leading_axes(native: None) -> None:
    x, w = randn(2, 3, 16), quantize_weight(randn(5, 16, seed=1))
    assert isinstance(w, Int8Weight) and w.values_OI.dtype == torch.int8
    assert torch.equal(int8_linear(x, w), int8_linear(x.flatten(0, 1), w).unflatten(0, (2, 3)))


@pytest.mark.parametrize("fast", [True, False])
def test_products_are_exact(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    """With the CPU's 8-bit products and, as on other CPUs and devices, without: 1,000 x 127 x 127 is below 2^24."""
    if fast and not int8._FAST_PRODUCTS:
        pytest.skip("this CPU has no AVX512_VNNI")
    monkeypatch.setattr(int8, "_FAST_PRODUCTS", fast)
    generator = torch.Generator().manual_seed(0)
    most = torch.full((33, 1000), 127, dtype=torch.int8)
    mixed = torch.randint(-127, 128, (40, 1000), dtype=torch.int8, generator=generator)
    for a, b in ((most, most.t()), (most, -most.t()), (mixed, mixed.t()), (mixed, mixed.t().contiguous())):
        found = int8._product(a, b)
        assert found.dtype == torch.int32 and torch.equal(found.double(), a.double() @ b.double())


ERROR = """
import torch
from oarsmith.kernels.int8 import int8_linear, quantize_weight
generator = torch.Generator().manual_seed(0)
x, w = torch.randn(64, 576, generator=generator), torch.randn(96, 576, generator=generator)
exact = x @ w.t()
print(float((int8_linear(x, quantize_weight(w)) - exact).norm() / exact.norm()))
"""


@pytest.mark.parametrize("isa", ["AVX512_CORE", "AVX2"])
def test_where_8_bit_products_overflow_they_are_not_used(isa: str) -> None:
    """oneDNN without VNNI sums pairs in 16 bits: its product of these two is off by 2 %, twice the rounding."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", ERROR], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.013
