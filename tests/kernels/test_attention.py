"""Block attention against PyTorch's scaled dot product attention, span by span."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import pytest
import torch
from torch import Tensor

from oarsmith.kernels import Scores, SpanBounds
from oarsmith.kernels import attention as bounds_attention
from oarsmith.kernels.attention import BLOCK
from oarsmith.kernels.attention import attention_reference as bounds_reference
from oarsmith.kernels.select import using

from .conftest import Compare, randn

# bf16: scores and probabilities are rounded to bf16 between the products, as in eager attention; against exact results
# of size about 1 that stays below two units in the last place of the largest entry, gradients below four.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-6}
Spans = list[tuple[int, int, int, int]]
CASES: dict[str, tuple[Spans, int | None]] = {
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


def attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, window: int | None = None) -> Tensor:
    return bounds_attention(q, k, v, [(*span, 0) for span in spans], Scores(scale, window))


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float, window: int | None = None
) -> Tensor:
    return bounds_reference(q, k, v, [(*span, 0) for span in spans], Scores(scale, window))


def inputs(spans: Spans, heads: int, groups: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    tokens, slots = max(s[1] for s in spans), max(s[3] for s in spans) + 3
    q = randn(tokens, heads, dim, dtype=dtype)
    return q, randn(slots, groups, dim, dtype=dtype, seed=1), randn(slots, groups, dim, dtype=dtype, seed=2)


def both(spans: Spans, window: int | None, scale: float) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
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


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pieces", [1, 2, 3, 9])
@pytest.mark.parametrize("window", [None, 7])
@torch.no_grad()
def test_keys_in_pieces(
    backend: Literal["native", "torch"], dtype: torch.dtype, pieces: int, window: int | None
) -> None:
    """The keys of three sequences lie in pieces, anywhere in a store; what lies between them is not a number."""
    draw = random.Random(pieces)
    spans = [(0, 1, 0, 40), (1, 8, 40, 100), (8, 9, 100, 101)]
    q, k, v = inputs(spans, 4, 2, 8, dtype)
    store_k, store_v = (torch.full((600, 2, 8), torch.nan, dtype=dtype) for _ in range(2))
    cuts = sorted({0, 40, 100, 101, *draw.sample(range(1, 101), 2 * (pieces - 1))})
    ranges: list[tuple[int, int, int]] = []
    slot = 0
    for start, stop in draw.sample(list(pairwise(cuts)), len(cuts) - 1):
        ranges.append((start, stop, slot + 3))
        slot += 3 + stop - start
    for start, stop, at in ranges:
        store_k[at : at + stop - start], store_v[at : at + stop - start] = k[start:stop], v[start:stop]
    bounds, scores = [(*span, 0) for span in spans], Scores(0.4, window)
    expected = bounds_reference(q, k[:101], v[:101], bounds, scores)
    with using(backend):
        found = bounds_attention(q, store_k, store_v, bounds, scores, sorted(ranges))
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[dtype])


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


def biased(heads: int) -> Tensor:
    """ALiBi over more positions than any span has."""
    return torch.tensor([0.5**i for i in range(heads)])[:, None] * torch.arange(3 * BLOCK)


FEATURES: dict[str, Callable[[int], Scores]] = {
    "bias": lambda heads: Scores(0.4, bias_HP=biased(heads)),
    "bias and window": lambda heads: Scores(0.4, window=7, bias_HP=biased(heads)),
    "softcap": lambda heads: Scores(0.4, softcap=1.5),
    "softcap and window": lambda heads: Scores(0.4, window=5, softcap=0.7),
}
SPANS: dict[str, list[SpanBounds]] = {
    "documents": [(0, 9, 0, 9, 0), (9, 10, 9, 10, 0), (10, 33, 10, 33, 0)],
    "cached": [(0, 3, 0, 20, 0), (3, 4, 21, 40, 0)],
    "blocks": [(0, 2 * BLOCK + 5, 0, 2 * BLOCK + 5, 0)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spans", SPANS)
@pytest.mark.parametrize("name", FEATURES)
def test_biased_and_capped_scores(compare: Compare, name: str, spans: str, dtype: torch.dtype) -> None:
    scores, bounds = FEATURES[name](4), SPANS[spans]
    tensors = inputs([span[:4] for span in bounds], 4, 2, 8, dtype)
    compare(
        lambda q, k, v: bounds_attention(q, k, v, bounds, scores),
        lambda q, k, v: bounds_reference(q, k, v, bounds, scores),
        *tensors,
        tolerance=2 * TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spans", SPANS)
def test_sinks(compare: Compare, spans: str, dtype: torch.dtype) -> None:
    """The sinks get their gradient too."""
    bounds = SPANS[spans]
    tensors = inputs([span[:4] for span in bounds], 4, 2, 8, dtype)
    sinks = randn(4, dtype=dtype, seed=9)
    compare(
        lambda q, k, v, s: bounds_attention(q, k, v, bounds, Scores(0.4, 6, sinks_H=s)),
        lambda q, k, v, s: bounds_reference(q, k, v, bounds, Scores(0.4, 6, sinks_H=s)),
        *tensors,
        sinks,
        # Each sink sums its gradient over all queries.
        tolerance=(2 if spans != "blocks" else 16) * TOLERANCE[dtype],
    )


@pytest.mark.parametrize(
    "bounds",
    [
        [(0, 9, 0, 9, 4), (9, 20, 9, 20, 0), (20, 23, 20, 23, 3)],
        [(0, 1, 0, 20, 5), (1, 5, 20, 30, 2)],
        [(0, 2 * BLOCK + 5, 0, 2 * BLOCK + 5, BLOCK + 50)],
    ],
)
def test_prefix(compare: Compare, bounds: list[SpanBounds]) -> None:
    tensors = inputs([span[:4] for span in bounds], 4, 2, 8, torch.float32)
    compare(
        lambda q, k, v: bounds_attention(q, k, v, bounds, Scores(0.4)),
        lambda q, k, v: bounds_reference(q, k, v, bounds, Scores(0.4)),
        *tensors,
        tolerance=TOLERANCE[torch.float32],
    )


def test_prefix_is_seen_from_before() -> None:
    q, k, v = inputs([(0, 6, 0, 6)], 1, 1, 4, torch.float32)
    changed = v.clone()
    changed[2] += 1.0
    before, after = (bounds_attention(q, k, x, [(0, 6, 0, 6, 3)], Scores(0.5)) for x in (v, changed))
    assert not torch.equal(before[0], after[0]), "query 0 sees key 2 of the prefix"
    changed = v.clone()
    changed[4] += 1.0
    assert torch.equal(before[:4], bounds_attention(q, k, changed, [(0, 6, 0, 6, 3)], Scores(0.5))[:4])


def test_values_of_another_size(compare: Compare) -> None:
    q, k, _ = inputs([(0, 13, 0, 13)], 4, 2, 8, torch.float32)
    v = randn(16, 2, 5, seed=4, dtype=torch.float32)
    bounds = [(0, 13, 0, 13, 0)]
    compare(
        lambda q, k, v: bounds_attention(q, k, v, bounds, Scores(0.4)),
        lambda q, k, v: bounds_reference(q, k, v, bounds, Scores(0.4)),
        q,
        k,
        v,
        tolerance=TOLERANCE[torch.float32],
    )
