"""Codes of quantized checkpoints in blocks: the same numbers, with scales in fp16."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from oarsmith.compiling import BuildError
from oarsmith.kernels.coded import E4M3, INT4, INT8, NF4, UINT4, UINT8, Code, CodedWeight, decode_reference, pack_pairs
from oarsmith.native.bindings import bindings
from oarsmith.native.library import load
from oarsmith.native.program import FORMATS
from oarsmith.native.stored import Coded, coded
from oarsmith.native.weights import Weights

try:
    load()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


def made(code: Code, rows: int, columns: int, group: int, *, zeros: bool = False, seed: int = 0) -> CodedWeight:
    """A weight of random codes; E4M3 without NaN."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16 if code.bits == 4 else 256, (rows, columns), generator=generator).to(torch.uint8)
    if code is E4M3:
        codes[(codes & 127) == 127] = 3
        codes[0, : min(columns, 8)] = torch.arange(min(columns, 8), dtype=torch.uint8)  # without a leading one
    groups = -(-columns // group)
    scale = torch.rand(rows, groups, generator=generator) * 0.02 + 1e-3
    zero = torch.randint(0, 17, (rows, groups), generator=generator).to(torch.uint8) if zeros else None
    packed = pack_pairs(codes) if code.bits == 4 else codes
    return CodedWeight(code=code, group=group, in_features=columns, codes_OB=packed, scale_OG=scale, zero_OG=zero)


def unpacked(weight: Coded, rows: Tensor | None = None) -> Tensor:
    """What the blocks stand for."""
    weights = Weights(2)
    matrix, arena = weights.coded(weight, rows), weights.pack()
    found = torch.empty(matrix.rows, matrix.columns)
    unpack = bindings().native_unpack_row
    unpack.argtypes, unpack.restype = [ctypes.c_int32, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p], None
    for row in range(matrix.rows):
        place = arena.address + matrix.offset
        unpack(FORMATS.index(matrix.format), place, matrix.rows, matrix.columns, row, found[row].data_ptr())
    return found


def check(found: Tensor, weight: CodedWeight) -> None:
    """Off by the rounding of scales, and of a low that is at most 17 of them."""
    expected, columns = decode_reference(weight, torch.float32), torch.arange(weight.in_features) // weight.group
    low = 17 if weight.code.bits == 4 else 0
    most = (expected.abs() + low * weight.scale_OG.abs()[:, columns]) * 2.0**-11
    assert bool(((found - expected).abs() <= most + 1e-12).all())


@pytest.mark.parametrize(
    ("rows", "columns", "group"), [(33, 96, 32), (5, 70, 64), (64, 256, 128), (17, 45, 45), (16, 576, 64)]
)
@pytest.mark.parametrize(
    ("code", "zeros", "format"),
    [(UINT4, True, "int4"), (INT4, False, "int4"), (INT8, False, "int8"), (E4M3, False, "e4m3")],
    ids=["uint4", "int4", "int8", "e4m3"],
)
def test_numbers_are_kept(code: Code, zeros: bool, format: str, rows: int, columns: int, group: int) -> None:
    weight = made(code, rows, columns, group, zeros=zeros)
    found = coded([(0, weight)])
    assert isinstance(found, Coded) and found.format == format
    check(unpacked(found), weight)


def test_scales_of_16_bits_are_exact() -> None:
    for code in (INT4, INT8, E4M3):
        weight = made(code, 40, 128, 32)
        weight = CodedWeight(
            code=code, group=32, in_features=128, codes_OB=weight.codes_OB, scale_OG=weight.scale_OG.bfloat16()
        )
        found = coded([(0, weight)])
        assert isinstance(found, Coded)
        assert torch.equal(unpacked(found), decode_reference(weight, torch.float32))


def test_rows_elsewhere() -> None:
    weight, rows = made(UINT4, 20, 64, 64, zeros=True), torch.tensor([19, -1, 0, 3, 3])
    found = coded([(0, weight)])
    assert isinstance(found, Coded)
    whole, chosen = unpacked(found), unpacked(found, rows)
    assert torch.equal(chosen[[0, 2, 3, 4]], whole[[19, 0, 3, 3]]) and not chosen[1].any()


def test_parts_with_steps_of_their_own() -> None:
    """Fused maps: other groups, zeros or none, and 4 bits beside 8."""
    q, k, v = made(UINT4, 32, 128, 64, zeros=True), made(INT4, 8, 128, 128, seed=1), made(INT8, 8, 128, 32, seed=2)
    found = coded([(32, k), (0, q)])
    assert isinstance(found, Coded) and (found.format, found.group) == ("int4", 32)
    blocks = unpacked(found)
    check(blocks[:32], q)
    check(blocks[32:], k)
    mixed = coded([(0, k), (8, v)])
    assert isinstance(mixed, Coded) and mixed.format == "int8"
    check(unpacked(mixed)[8:], v)
    assert coded([(0, v), (8, made(E4M3, 8, 128, 128))]) == "parts of integers and of floats"


def test_few_bits_in_bytes() -> None:
    """2 and 3 bits without zeros lie in bytes."""
    weight = made(INT8, 16, 64, 32)
    codes = ((weight.codes_OB & 3) - 2).contiguous()
    weight = CodedWeight(code=INT8, group=32, in_features=64, codes_OB=codes, scale_OG=weight.scale_OG)
    found = coded([(0, weight)])
    assert isinstance(found, Coded) and found.format == "int4"
    check(unpacked(found), weight)


def test_what_has_no_format() -> None:
    assert coded([(0, made(INT4, 8, 96, 48))]) == "groups of 48 columns"
    assert coded([(0, made(NF4, 8, 64, 64))]) == "numbers of nf4"
    weight = made(UINT8, 8, 64, 64, zeros=True)
    assert coded([(0, weight)]) == "8 bits with zeros"
    for code, size in ((INT8, 1e-7), (INT4, 1e5), (E4M3, 1e-10)):
        weight = made(code, 8, 64, 64)
        weight = CodedWeight(
            code=code, group=64, in_features=64, codes_OB=weight.codes_OB, scale_OG=weight.scale_OG * size * 100
        )
        assert coded([(0, weight)]) == "scales beyond fp16"
