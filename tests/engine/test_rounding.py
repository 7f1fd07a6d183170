"""The rounding on PyTorch is that of the packed weights."""

from __future__ import annotations

import ctypes

import pytest
import torch

from matrix.bench import Bench
from matrix.rows import ROWS
from oarsmith.compiling import BuildError
from oarsmith.engine.rounding import round_weights, rounded
from oarsmith.native.bindings import bindings
from oarsmith.native.program import FORMATS
from oarsmith.native.weights import Weights


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("size", [32, 64, 50, 33])
def test_packed_weights(weights: str, size: int) -> None:
    weight_OI = torch.randn(64, size) * torch.logspace(-3, 1, 64)[:, None]
    weight_OI[3], weight_OI[4], weight_OI[5], weight_OI[6] = 0.0, 1.25, weight_OI[5].abs() + 1, -weight_OI[6].abs()
    weight_OI[7] = torch.randint(-8, 6, (size,)) * 0.0123
    try:
        packing = Weights(1)
    except BuildError as error:
        pytest.skip(str(error))
    matrix = packing.matrix(weight_OI, weights)
    arena = packing.pack()
    found_OI = torch.empty(64, size)
    unpack = bindings().native_unpack_row
    unpack.argtypes, unpack.restype = [ctypes.c_int32, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p], None
    for row in range(64):
        place = arena.address + matrix.offset
        unpack(FORMATS.index(weights), place, 64, size, row, found_OI[row].data_ptr())
    torch.testing.assert_close(rounded(weight_OI, weights), found_OI, rtol=1e-6, atol=0)


def test_zero_stays_zero() -> None:
    """Where inputs are always large and weights near zero, half a step of error would be far too much."""
    weight_OI = torch.randn(64, 64) * 3
    weight_OI[:, ::5] = 0.0
    found_OI = rounded(weight_OI, "int4")
    step_OG = weight_OI.unflatten(-1, (-1, 32)).amax(-1) - weight_OI.unflatten(-1, (-1, 32)).amin(-1)
    error_OG = found_OI[:, ::5].abs().amax(-1) / step_OG.amin(-1)
    assert float(error_OG.max()) < 1e-3
    assert float((found_OI - weight_OI).abs().max()) < float(step_OG.max()) / 15 * 0.6


@torch.no_grad()
@pytest.mark.parametrize(("weights", "most"), [("int8", 0.05), ("int4", 0.4)])
def test_a_rounded_model_is_near(weights: str, most: float, tmp_path) -> None:
    model = Bench("llama", ROWS["llama"], tmp_path).model()
    ids = torch.arange(5, 40)[None]
    before = model(ids)
    round_weights(model, weights)
    assert 0 < float((model(ids) - before).norm() / before.norm()) < most


@torch.no_grad()
def test_experts_are_rounded(tmp_path) -> None:
    model = Bench("mixtral", ROWS["mixtral"], tmp_path).model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    round_weights(model, "int4")
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    expected = ("attention.qkv", "attention.out", "gate_up", "down", "embedding", "head")
    assert changed == {name for name in before if name.endswith(".weight") and any(word in name for word in expected)}
