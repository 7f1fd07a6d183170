"""Block attention against PyTorch's scaled dot product attention, span by span."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from oarsmith.kernels import attention
from oarsmith.kernels.attention import BLOCK, SpanBounds, attention_reference
from oarsmith.kernels.select import using

from .conftest import Compare, randn

# bf16: scores and probabilities are rounded to bf16 between the products, as in eager attention; against exact results
# of size about 1 that stays below two units in the last place of the largest entry, gradients below four.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-6}
CASES: dict[str, tuple[list[SpanBounds], int | None]] = {
    "one token": ([(0, 1, 0, 1)], None),
    "odd sizes": ([(0, 13, 0, 13)], None),
    "several documents": ([(0, 5, 0, 5), (5, 6, 5, 6), (6, 23, 6, 23)], None),
    "window": ([(0, 23, 0, 23)], 5),
    "window of one": ([(0, 9, 0, 9)], 1),
    "window beyond the document": ([(0, 9, 0, 9)], 100),
    "cached, one query": ([(0, 1, 2, 20)], None),
    "cached, several queries": ([(0, 7, 0, 30), (7, 8, 40, 41), (8, 12, 45, 60)], None),
    "cached, window": ([(0, 7, 0, 30), (7, 8, 31, 50)], 6),
    "an empty span": ([(0, 4, 0, 4), (4, 4, 4, 4), (4, 9, 4, 9)], None),
}


def inputs(spans: list[SpanBounds], heads: int, groups: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    tokens, slots = max(s[1] for s in spans), max(s[3] for s in spans) + 3
    q = randn(tokens, heads, dim, dtype=dtype)
    return q, randn(slots, groups, dim, dtype=dtype, seed=1), randn(slots, groups, dim, dtype=dtype, seed=2)


def both(
    spans: list[SpanBounds], window: int | None, scale: float
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    return (
        lambda q, k, v: attention(q, k, v, spans, scale=scale, window=window),
        lambda q, k, v: attention_reference(q, k, v, spans, scale=scale, window=window),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups", "dim"), [(1, 1, 3), (4, 2, 8), (6, 1, 5), (3, 3, 16)])
@pytest.mark.parametrize("case", CASES)
def test_attention(compare: Compare, case: str, heads: int, groups: int, dim: int, dtype: torch.dtype) -> None:
    spans, window = CASES[case]
    fast, twin = both(spans, window, dim**-0.5)
    compare(fast, twin, *inputs(spans, heads, groups, dim, dtype), tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [BLOCK + BLOCK // 2, BLOCK + BLOCK // 2 + 1, 2 * BLOCK + 7])
@pytest.mark.parametrize("window", [None, 3, BLOCK + 5])
def test_spans_of_several_blocks(compare: Compare, length: int, window: int | None, dtype: torch.dtype) -> None:
    spans = [(0, 5, 0, 5), (5, 5 + length, 5, 5 + length)]
    fast, twin = both(spans, window, 0.5)
    compare(fast, twin, *inputs(spans, 4, 2, 4, dtype), tolerance=2 * TOLERANCE[dtype])


def test_long_prompt_over_a_cache(compare: Compare) -> None:
    """Several blocks of queries that already have keys before them."""
    spans = [(0, 2 * BLOCK + 9, 11, 2 * BLOCK + 9 + 11 + 40)]
    fast, twin = both(spans, None, 0.4)
    compare(fast, twin, *inputs(spans, 2, 1, 4, torch.float32), tolerance=TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_of_a_fused_projection(compare: Compare, dtype: torch.dtype) -> None:
    qkv = randn(17, 64, dtype=dtype)
    q, k, v = qkv.split((32, 16, 16), dim=-1)
    views = q.unflatten(-1, (4, 8)), k.unflatten(-1, (2, 8)), v.unflatten(-1, (2, 8))
    assert not any(x.is_contiguous() for x in views)
    fast, twin = both([(0, 6, 0, 6), (6, 17, 6, 17)], 4, 0.3)
    compare(fast, twin, *views, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_documents_do_not_feel_each_other(native: None, backend: str) -> None:
    """Bitwise: whatever another document holds, also NaN, leaves this one's output and gradients as they are."""
    spans = [(0, 6, 0, 6), (6, 17, 6, 17)]

    def first(poison: float) -> tuple[Tensor, ...]:
        leaves = [x.clone() for x in inputs([(0, 17, 0, 17)], 4, 2, 8, torch.float32)]
        for x in leaves:
            x[6:] = poison
        leaves = [x.requires_grad_() for x in leaves]
        out = attention(*leaves, spans, scale=0.3)[:6]
        return (out, *(g[:6] for g in torch.autograd.grad(out.square().sum(), leaves)))

    with using("native" if backend == "native" else "torch"):
        for clean, poisoned in zip(first(0.5), first(math.nan), strict=True):
            assert torch.equal(clean, poisoned)


def test_slots_outside_the_spans_are_never_read(native: None) -> None:
    """A key/value store has rooms that hold anything: other sequences, memory never written."""
    q, k, v = inputs([(0, 3, 4, 12)], 2, 2, 4, torch.float32)
    before = attention(q, k, v, [(0, 3, 4, 12)], scale=0.5)
    for x in (k, v):
        x[:4], x[12:] = math.nan, math.inf
    assert torch.equal(attention(q, k, v, [(0, 3, 4, 12)], scale=0.5), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_nan_does_not_vanish(native: None, which: int, dtype: torch.dtype) -> None:
    tensors = [x.clone() for x in inputs([(0, 9, 0, 9)], 2, 1, 4, dtype)]
    tensors[which][4] = math.nan
    out = attention(*tensors, [(0, 9, 0, 9)], scale=0.5)
    assert out[4].isnan().all()
    if which > 0:
        assert out[5:].isnan().all()
    leaves = [x.requires_grad_() for x in tensors]
    grads = torch.autograd.grad(attention(*leaves, [(0, 9, 0, 9)], scale=0.5).float().sum(), leaves)
    assert all(g.isnan().any() for g in grads[: 1 if which == 2 else 3])


def test_infinite_scores(native: None) -> None:
    """A key that can never be chosen counts nothing; an infinite score is as broken as in PyTorch."""
    q, k, v = inputs([(0, 3, 0, 3)], 1, 1, 2, torch.float32)
    q, k = q.abs(), k.abs()
    k[1] = -math.inf
    found, expected = (f(q, k, v, [(0, 3, 0, 3)], scale=0.5) for f in (attention, attention_reference))
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[2], expected[2])
    assert found[2].isfinite().all()
    k[1] = math.inf
    assert attention(q, k, v, [(0, 3, 0, 3)], scale=0.5)[2].isnan().all()


def test_large_scores_stay_finite(compare: Compare) -> None:
    q, k, v = inputs([(0, 9, 0, 9)], 2, 1, 4, torch.float32)
    fast, twin = both([(0, 9, 0, 9)], None, 0.5)
    compare(fast, twin, q * 100, k * 100, v, tolerance=1e-3)  # scores of 10^4: an fp32 ulp of them is 1e-3


def test_no_queries_at_all(native: None) -> None:
    q, k, v = inputs([(0, 3, 0, 3)], 2, 1, 4, torch.float32)
    assert attention(q[:0], k, v, [(0, 0, 0, 0)], scale=1.0).shape == (0, 2, 4)
