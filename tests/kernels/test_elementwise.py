"""RMSNorm, rotary embedding and gated activations against their PyTorch twins."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from oarsmith.kernels import gated_activation, rms_norm, rope
from oarsmith.kernels.activation import activation, gated_activation_reference
from oarsmith.kernels.norm import rms_norm_reference
from oarsmith.kernels.rope import rope_reference

from .conftest import Compare, randn

DTYPES = [torch.float32, torch.bfloat16]
KINDS = ["silu", "gelu", "gelu_tanh", "relu"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (5, 3, 17), (2, 3, 2, 8), (13,), (0, 16)])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_rms_norm(compare: Compare, shape: tuple[int, ...], dtype: torch.dtype, unit_offset: bool) -> None:
    x, w = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype, seed=1)

    def with_kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, w, 1e-5, unit_offset)

    def twin(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return rms_norm_reference(x, w, 1e-5, unit_offset)

    compare(with_kernel, twin, x, w)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_views(compare: Compare, dtype: torch.dtype) -> None:
    """Slices of a fused projection, transposed rows and a broadcast row."""
    wide, w = randn(9, 60, dtype=dtype), randn(20, dtype=dtype, seed=1)
    heads = wide[:, 20:40].unflatten(-1, (4, 5))
    for x, weight in ((wide[:, 20:40], w), (heads, w[:5]), (wide[:, :20].t().t(), w), (wide[:1, :20].expand(4, 20), w)):
        compare(lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: rms_norm_reference(x, w, 1e-6), x, weight)
    transposed = randn(20, 6, dtype=dtype).t()
    assert transposed.stride(-1) != 1
    compare(lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: rms_norm_reference(x, w, 1e-6), transposed, w)


def test_rms_norm_rounds_like_the_twin(native: None) -> None:
    """bf16: the normalised value is rounded before the weight is applied, as in the models' own code."""
    x, w = randn(64, 96, dtype=torch.bfloat16), randn(96, dtype=torch.bfloat16, seed=1)
    differing = rms_norm(x, w, 1e-5) != rms_norm_reference(x, w, 1e-5)
    # Another order of the sum moves the statistic by an ulp of fp32, which seldom crosses a rounding border of bf16.
    assert differing.float().mean() < 0.002


@pytest.mark.parametrize("threads", [2, 3])
def test_several_threads(compare: Compare, threads: int) -> None:
    """More threads than rows too; the weight's gradient is summed over the threads' parts."""
    torch.set_num_threads(threads)
    for rows in (1, 2, 7):
        compare(
            lambda x, w: rms_norm(x, w, 1e-5),
            lambda x, w: rms_norm_reference(x, w, 1e-5),
            randn(rows, 9),
            randn(9, seed=1),
        )


def test_weight_that_needs_no_gradient(native: None) -> None:
    x = randn(5, 8).requires_grad_()
    rms_norm(x, randn(8), 1e-5).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "dim", "freqs"), [(1, 1, 2, 1), (7, 3, 10, 5), (5, 2, 12, 3), (0, 2, 4, 2)]
)
@pytest.mark.parametrize("adjacent", [False, True])
def test_rope(
    compare: Compare, tokens: int, heads: int, dim: int, freqs: int, dtype: torch.dtype, adjacent: bool
) -> None:
    angle = randn(tokens, freqs, seed=2) * 3
    cos, sin = angle.cos(), angle.sin()
    x = randn(tokens, heads, dim, dtype=dtype)
    compare(lambda x: rope(x, cos, sin, adjacent=adjacent), lambda x: rope_reference(x, cos, sin, adjacent=adjacent), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_of_views(compare: Compare, dtype: torch.dtype) -> None:
    angle = randn(6, 4, seed=2)
    cos, sin = angle.cos(), angle.sin()
    wide = randn(6, 48, dtype=dtype)
    slices = wide[:, 8:32].unflatten(-1, (3, 8))
    for x in (
        slices,
        slices.transpose(0, 1).contiguous().transpose(0, 1),
        randn(8, 3, 6, dtype=dtype).permute(2, 1, 0),
    ):
        compare(lambda x: rope(x, cos, sin), lambda x: rope_reference(x, cos, sin), x)


def test_rope_backward_is_the_inverse(native: None) -> None:
    angle = randn(5, 4, seed=2)
    x = randn(5, 2, 8)
    turned = rope(x, angle.cos(), angle.sin())
    torch.testing.assert_close(rope(turned, angle.cos(), -angle.sin()), x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_rope_refuses_tables_of_another_length(native: None) -> None:
    """The kernel would read past their end."""
    with pytest.raises(AssertionError):
        rope(randn(5, 2, 8), randn(4, 4), randn(4, 4))
    with pytest.raises(AssertionError):
        rope(randn(5, 2, 8), randn(5, 4).double(), randn(5, 4).double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 2), (5, 34), (3, 2, 6), (0, 8)])
def test_gated_activation(compare: Compare, shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    x = randn(*shape, dtype=dtype) * 3
    compare(lambda x: gated_activation(x, kind), lambda x: gated_activation_reference(x, kind), x)


@pytest.mark.parametrize("kind", KINDS)
def test_gated_activation_over_the_whole_range(compare: Compare, kind: str) -> None:
    gate = torch.cat((torch.linspace(-100, 100, 1001), torch.tensor([1e-8, -1e-8, 3e4, -3e4, 0.0])))[:, None]
    compare(
        lambda x: gated_activation(x, kind),
        lambda x: gated_activation_reference(x, kind),
        torch.cat((gate, torch.ones_like(gate)), -1),
        tolerance=1e-6,
    )


def test_gated_activation_of_a_view(compare: Compare) -> None:
    compare(lambda x: gated_activation(x, "silu"), lambda x: gated_activation_reference(x, "silu"), randn(8, 5).t())


def test_activation_kinds() -> None:
    x = randn(50)
    tanh = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(activation(x, "gelu_tanh"), tanh)
    torch.testing.assert_close(activation(x, "gelu"), functional.gelu(x))
    torch.testing.assert_close(activation(x, "silu"), x * torch.sigmoid(x))
    torch.testing.assert_close(activation(x, "relu"), x.clamp_min(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_does_not_vanish(native: None, dtype: torch.dtype) -> None:
    x = torch.ones(3, 8, dtype=dtype)
    x[1, 2] = math.nan
    assert rms_norm(x, torch.ones(8, dtype=dtype), 1e-5).isnan().any(-1).tolist() == [False, True, False]
    turned = rope(x[:, None], torch.ones(3, 4), torch.zeros(3, 4))
    assert turned[1, 0, 2].isnan() and not turned[0].isnan().any()
    for kind in KINDS:
        for column in (2, 6):  # in the gate, in the other factor
            x = torch.ones(3, 8, dtype=dtype)
            x[1, column] = math.nan
            leaf = x.requires_grad_()
            out = gated_activation(leaf, kind)
            assert out.isnan().nonzero().tolist() == [[1, 2]], kind
            (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
            assert grad[1].isnan().any() and not grad[0].isnan().any(), kind


@pytest.mark.parametrize("kind", KINDS)
def test_infinity_is_not_softened(native: None, kind: str) -> None:
    x = torch.tensor([[math.inf, 1.0]])
    assert gated_activation(x, kind).item() == math.inf
    x = torch.tensor([[2.0, -math.inf]])
    assert gated_activation(x, kind).item() == -math.inf


def test_infinity_breaks_the_norm_of_its_row_only(native: None) -> None:
    x = torch.ones(2, 4)
    x[0, 1] = math.inf
    found, expected = rms_norm(x, torch.ones(4), 1e-5), rms_norm_reference(x, torch.ones(4), 1e-5)
    assert torch.equal(found.isnan(), expected.isnan()) and found.isnan().any()
