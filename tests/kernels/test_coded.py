"""Weights in codes: the kernel beside its twin, products beside those of the decoded weight, what is held at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from oarsmith.kernels.coded import (
    E4M3,
    FP4,
    INT4,
    INT8,
    NF4,
    TILE,
    UINT4,
    UINT8,
    Code,
    CodedWeight,
    coded_backward,
    coded_forward,
    decode,
    decode_reference,
    pack_pairs,
    unpack_pairs,
)
from oarsmith.kernels.encode import encode_blocks, encode_blocks_reference, encode_groups, encode_rows
from oarsmith.kernels.select import using

from .conftest import randn

CODES = [NF4, FP4, INT4, UINT4, INT8, UINT8, E4M3]


def weight(
    code: Code, out: int, in_features: int, group: int, *, zeros: bool = False, dtype: torch.dtype = torch.float32
) -> CodedWeight:
    """Random codes, none of them NaN."""
    generator = torch.Generator().manual_seed(out)
    numbers = torch.randint(0, 127 if code is E4M3 else 1 << code.bits, (out, in_features), generator=generator)
    numbers, groups = numbers.to(torch.uint8), -(-in_features // group)
    return CodedWeight(
        code=code,
        group=group,
        in_features=in_features,
        codes_OB=pack_pairs(numbers) if code.bits == 4 else numbers,
        scale_OG=(torch.rand(out, groups, generator=generator) + 0.1).to(dtype),
        zero_OG=torch.randint(0, 16, (out, groups), generator=generator).to(torch.uint8) if zeros else None,
    )


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
@pytest.mark.parametrize("sizes", [(3, 7, 4), (5, 64, 64), (9, 200, 64), (4, 96, 96), (0, 8, 8), (70, 576, 32)])
def test_the_kernel_and_its_twin(native: None, code: Code, sizes: tuple[int, int, int]) -> None:
    for zeros in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            made = weight(code, *sizes, zeros=zeros, dtype=dtype)
            for start, stop in ((0, sizes[1]), (2, 6), (sizes[1] // 4 * 2, sizes[1])):
                found = decode(made, dtype, start, stop)
                assert found.dtype == dtype and torch.equal(found, decode_reference(made, dtype, start, stop))
    rows = made.rows(1, 3)
    assert torch.equal(decode(rows, torch.bfloat16), decode(made, torch.bfloat16)[1:3])


def test_what_codes_stand_for() -> None:
    """By hand: the first of two codes lies in the upper half of a byte."""
    made = CodedWeight(
        code=UINT4,
        group=2,
        in_features=3,
        codes_OB=torch.tensor([[0x1F, 0x70]], dtype=torch.uint8),
        scale_OG=torch.tensor([[2.0, 0.5]]),
        zero_OG=torch.tensor([[3, 8]], dtype=torch.uint8),
    )
    assert decode(made, torch.float32).tolist() == [[-4.0, 24.0, -0.5]]
    assert unpack_pairs(made.codes_OB).tolist() == [[1, 15, 7, 0]]
    assert INT8.values[255] == -1 and INT8.values[127] == 127 and INT4.values[0] == -8
    assert E4M3.values[0x7E] == 448 and E4M3.values[0x08] == 2**-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_products(native: None, dtype: torch.dtype, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the decoded weight, whatever the parts."""
    made, x, dy, bias = weight(NF4, 90, 200, 64), randn(7, 200), randn(7, 90, seed=1), randn(90, seed=2)
    x, dy, bias = x.to(dtype), dy.to(dtype), bias.to(dtype)
    whole = decode(made, dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    for tile in (1, 700, 10**9):
        monkeypatch.setattr("oarsmith.kernels.coded.TILE", tile)
        with using(backend):
            found = coded_forward(x, made), coded_forward(x, made, bias), coded_backward(dy, made)
            empty = coded_forward(x[:0], made), coded_backward(dy[:0], made)
        for have, want in zip(found, (x @ whole.t(), x @ whole.t() + bias, dy @ whole), strict=True):
            assert have.dtype == dtype
            torch.testing.assert_close(have, want, rtol=tolerance, atol=tolerance * 20)
        assert [part.shape for part in empty] == [(0, 90), (0, 200)]


class Largest(TorchDispatchMode):
    """The largest tensor of floats that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point():
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("sizes", [(3000, 1024), (1024, 3000), (100, 40_000)])
@pytest.mark.parametrize("group", [64, 10**6])
def test_no_product_holds_the_weight(native: None, sizes: tuple[int, int], group: int) -> None:
    """Parts of about a megabyte of numbers, of weights of 3 and 4; also where a group is a whole row."""
    made = weight(NF4, *sizes, min(group, sizes[1]))
    for backend in ("native", "torch"):
        x, dy = randn(2, sizes[1]), randn(2, sizes[0])
        with using(backend), Largest() as largest:  # type: ignore[arg-type]
            coded_forward(x, made)
            coded_backward(dy, made)
        assert largest.numbers <= TILE * 1.1 < sizes[0] * sizes[1]


@pytest.mark.parametrize("code", [NF4, FP4], ids=lambda code: code.name)
@pytest.mark.parametrize("in_features", [128, 100, 7])
def test_blocks(code: Code, in_features: int) -> None:
    """Every number becomes the nearest value; the largest of a block is kept exactly."""
    x = randn(5, in_features)
    x[2] = 0
    codes, absmax = encode_blocks(x, code, 64)
    made = CodedWeight(code=code, group=64, in_features=in_features, codes_OB=codes, scale_OG=absmax)
    found = decode(made, torch.float32)
    scales = absmax.repeat_interleave(64, 1)[:, :in_features]
    every = torch.tensor(code.values) * scales[..., None]
    torch.testing.assert_close((found - x).abs(), (every - x[..., None]).abs().amin(-1), rtol=0, atol=1e-6)
    assert torch.equal(found[2], torch.zeros(in_features))
    for start in range(0, in_features, 64):
        block = slice(start, start + 64)
        assert torch.equal(found[:, block].abs().amax(1), x[:, block].abs().amax(1))


@pytest.mark.parametrize("code", [NF4, FP4], ids=lambda code: code.name)
@pytest.mark.parametrize("sizes", [(3, 7, 4), (40, 576, 64), (5, 200, 64), (2, 96, 96), (0, 8, 8)])
def test_both_ways_to_blocks(native: None, code: Code, sizes: tuple[int, int, int]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = randn(sizes[0], sizes[1], dtype=dtype)
        x[:1] = 0
        # Half way between two values, and what bf16 rounds to: ties.
        x[-1:, :5] = torch.tensor([1.0, 0.5, -0.5, 0.25, -1.0])
        found, expected = (make(x, code, sizes[2]) for make in (encode_blocks, encode_blocks_reference))
        assert all(torch.equal(have, want) for have, want in zip(found, expected, strict=True))


def test_groups_and_rows() -> None:
    """At most half a step away. A group without a number on one side of 0 has 0 among its steps."""
    x = randn(6, 200)
    x[1], x[2], x[3] = x[1].abs(), -x[2].abs(), 0
    codes, scale, zero = encode_groups(x, 64)
    made = CodedWeight(code=UINT4, group=64, in_features=200, codes_OB=codes, scale_OG=scale, zero_OG=zero)
    steps = scale.float().repeat_interleave(64, 1)[:, :200]
    # A scale in bf16 is up to 1/256 short: the last of 15 steps moves by as much.
    assert bool(((decode(made, torch.float32) - x).abs() <= 0.57 * steps + 1e-6).all())
    assert scale.dtype == torch.bfloat16 and zero[1].eq(0).all() and zero[2].eq(15).all()
    values, scale = encode_rows(x)
    assert bool(((values * scale[:, None] - x).abs() <= 0.5 * scale[:, None] + 1e-6).all())
    assert values.abs().amax(1).tolist() == [127, 127, 127, 0, 127, 127]


def test_what_is_not_a_number_stays_so() -> None:
    x = randn(3, 64)
    x[1, 5] = float("nan")
    codes, absmax = encode_blocks(x, NF4, 64)
    blocks = CodedWeight(code=NF4, group=64, in_features=64, codes_OB=codes, scale_OG=absmax)
    codes, scale, zero = encode_groups(x, 64)
    groups = CodedWeight(code=UINT4, group=64, in_features=64, codes_OB=codes, scale_OG=scale, zero_OG=zero)
    values, scale = encode_rows(x)
    for found in (decode(blocks, torch.float32), decode(groups, torch.float32), values * scale[:, None]):
        assert found.isnan().any(1).tolist() == [False, True, False]
