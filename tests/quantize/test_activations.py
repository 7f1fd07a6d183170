"""Activations in 8 bits, by hand and beside plain arithmetic; what calibration sees."""

from __future__ import annotations

import pytest
import torch

from oarsmith.errors import ConfigError, DataError, ModelError
from oarsmith.quantize.activations import Observer, quantize_activations, round_activations
from oarsmith.quantize.scheme import Activations

E4M3 = torch.float8_e4m3fn


def inputs() -> torch.Tensor:
    return torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 9, 256)


def test_a_token_by_hand() -> None:
    numbers, scale = quantize_activations(torch.tensor([[1.27, -0.5, 0.004]]), Activations())
    assert numbers.tolist() == [[127, -50, 0]] and float(scale) == pytest.approx(0.01)
    assert numbers.dtype is torch.int8
    numbers, scale = quantize_activations(torch.tensor([[448.0, 17.0, -0.3]]), Activations(code="e4m3"))
    # 17 lies halfway between 16 and 18, the even one wins; 0.3 between 0.28125 and 0.3125.
    assert numbers.float().tolist() == [[448.0, 16.0, -0.3125]] and numbers.dtype is E4M3


@pytest.mark.parametrize("code", ["int", "e4m3"])
@pytest.mark.parametrize("group", [None, 64, 128])
def test_dynamic_scales_cover_their_range(code: str, group: int | None) -> None:
    how = Activations(code=code, group=group)  # type: ignore[arg-type]
    x = inputs()
    numbers, scale = quantize_activations(x, how)
    assert scale.shape == (3, 5, 1 if group is None else 256 // group)
    largest = 127 if code == "int" else 448
    most = x.unflatten(-1, (-1, group or 256)).abs().amax(-1)
    torch.testing.assert_close(scale, most / largest)
    rounded = round_activations(x, how)
    wide = scale.repeat_interleave(group or 256, -1)
    if code == "int":
        torch.testing.assert_close(rounded, (x / wide).round() * wide)
    else:
        torch.testing.assert_close(rounded, (x / wide).to(E4M3).float() * wide)
    assert int(numbers.float().abs().max()) == largest
    assert round_activations(x.bfloat16(), how).dtype is torch.bfloat16


@pytest.mark.parametrize("code", ["int", "e4m3"])
def test_a_static_scale_cuts(code: str) -> None:
    how = Activations(code=code, static=True)  # type: ignore[arg-type]
    largest = 127.0 if code == "int" else 448.0
    rounded = round_activations(torch.tensor([[0.0, 300.0, -1000.0]]), how, torch.tensor(1.0))
    assert rounded[0, 2] == -largest
    with pytest.raises(ConfigError, match="calibrate, or use dynamic"):
        round_activations(inputs(), how)


def test_tokens_of_zeros_and_groups_that_do_not_divide() -> None:
    zeros = torch.zeros(2, 128)
    for how in (Activations(), Activations(code="e4m3"), Activations(code="e4m3", group=64)):
        assert torch.equal(round_activations(zeros, how), zeros)
    assert round_activations(zeros[:0], Activations()).shape == (0, 128)
    with pytest.raises(ConfigError, match="groups of 100 do not divide 128"):
        round_activations(zeros, Activations(group=100))


def test_observers() -> None:
    first, second = torch.tensor([[1.0, -3.0]]), torch.tensor([[0.5, 1.0], [-1.0, 0.0]])
    largest, mean = Observer("abs_max"), Observer("avg")
    for seen in (largest, mean):
        seen.add(first)
        seen.add(second)
        seen.add(second[:0])
    assert float(largest.limit) == 3.0 and float(mean.limit) == 2.0
    assert float(largest.scale("int")) == pytest.approx(3 / 127)
    assert float(mean.scale("e4m3")) == pytest.approx(2 / 448)


def test_observers_of_heads() -> None:
    x = torch.randn(3, 7, 4, 8, generator=torch.Generator().manual_seed(0))
    largest, mean = Observer("abs_max", heads=True), Observer("avg", heads=True)
    for sample in x:
        largest.add(sample)
        mean.add(sample)
    torch.testing.assert_close(largest.limit, x.abs().amax((0, 1, 3)))
    torch.testing.assert_close(mean.limit, x.abs().amax((1, 3)).mean(0))
    assert largest.scale("int").shape == (4,)


def test_what_observers_refuse() -> None:
    with pytest.raises(ModelError, match="a sample of activations: 1 of 3"):
        Observer("avg").add(torch.tensor([1.0, torch.nan, 2.0]))
    with pytest.raises(DataError, match="no activation"):
        _ = Observer("avg").limit
    silent = Observer("abs_max")
    silent.add(torch.zeros(2, 2))
    assert float(silent.scale("int")) > 0
