"""Inputs of products that backward makes again: the same gradients, and less memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.kernels import gated_activation, linear, rms_norm
from oarsmith.kernels.remake import leave_recipe, recipe_of

from .conftest import Compare, randn

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 6), (7, 6), (2, 3, 6), (0, 6)])
def test_linear(compare: Compare, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, w, b = randn(*shape, dtype=dtype), randn(5, 6, dtype=dtype, seed=1), randn(5, dtype=dtype, seed=2)
    compare(linear, functional.linear, x, w, b)
    compare(lambda x, w: linear(x, w, None), functional.linear, x, w)


def normed(x: Tensor, w: Tensor) -> Tensor:
    return rms_norm(x, w, 1e-5)


def gated(x: Tensor, w: Tensor) -> Tensor:
    return gated_activation(x * w, "silu")


def kept_and_gradients(
    part: Callable[[Tensor, Tensor], Tensor], last: Callable[..., Tensor]
) -> tuple[int, list[Tensor]]:
    """Bytes that backward of last(part(x)) keeps, and its gradients."""
    x, w = (
        randn(40, 24, dtype=torch.bfloat16).requires_grad_(),
        randn(24, dtype=torch.bfloat16, seed=1).requires_grad_(),
    )
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = part(x, w)
        map_ = randn(10, y.shape[-1], dtype=torch.bfloat16, seed=2).requires_grad_()
        out = last(y, map_, None)
    dout = randn(40, 10, dtype=torch.bfloat16, seed=3)
    return sum(kept.values()), list(torch.autograd.grad(out, (x, w, map_), dout))


@pytest.mark.parametrize("part", [normed, gated])
def test_the_input_is_made_again(native: None, part: Callable[[Tensor, Tensor], Tensor]) -> None:
    lean, found = kept_and_gradients(part, linear)
    full, expected = kept_and_gradients(part, functional.linear)
    width = 24 if part is normed else 12
    assert full - lean == 40 * width * 2, "the output of the part is what is not kept"
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_recipes() -> None:
    x = randn(3, 4).requires_grad_()
    y = leave_recipe(x * 2, lambda t: t * 2, x)
    make, inputs = recipe_of(y)
    assert torch.equal(make(*inputs), y) and not inputs[0].requires_grad
    assert recipe_of(x).inputs[0] is x, "no recipe"
    assert recipe_of(y.view(4, 3)).inputs[0].shape == (4, 3), "another tensor has no recipe"
    y.detach().add_(1)
    assert recipe_of(y).inputs[0] is y, "changed since"
    with torch.no_grad():
        z = leave_recipe(x * 2, lambda t: t * 2, x)
    assert recipe_of(z).inputs[0] is z, "nothing is kept where there is no backward"
