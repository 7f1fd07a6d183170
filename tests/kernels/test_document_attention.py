"""Attention of whole documents in one kernel, against exact attention and the block path."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from oarsmith.kernels import Scores, attention, select
from oarsmith.kernels.attention import attention_reference
from oarsmith.kernels.build import load_library
from oarsmith.kernels.document_attention import document_bounds
from oarsmith.kernels.select import Library, library, using

from .conftest import randn

# Relative to exact attention of the same bf16 inputs: outputs are rounded to 8 bits (0.2 %), and probabilities and
# score gradients are once more on the way.
TOLERANCE = 5e-3
LENGTHS = {
    "one token": [1],
    "odd": [1, 2, 3, 17, 47, 48, 49, 63, 64, 65],
    "several key blocks": [255, 256, 257, 600],
    "many long": [513, 600, 1025] * 3,
    "cut": [1100],
    "cut with others": [40, 2000, 3],
}


@pytest.fixture(scope="module", params=["as built", "without tiles"])
def native(request) -> Library:
    """The kernels as built for this CPU, and as built for one without AMX."""
    found = library()
    if found is None or not found.has_document_attention:
        pytest.skip("this CPU has no products of bf16 pairs")
    if request.param == "without tiles":
        if "amx_bf16" not in Path("/proc/cpuinfo").read_text():
            pytest.skip("as built, they use no tiles")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CXX", f"{os.environ.get('CXX', 'g++')} -mno-amx-tile")
            found = Library(load_library())
    return found


@pytest.fixture(autouse=True)
def chosen(native: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select._choice, "library", native)


def spans_of(lengths: list[int]) -> list[tuple[int, int, int, int, int]]:
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return [(a, b, a, b, 0) for a, b in pairwise(bounds)]


def inputs(tokens: int, heads: int, groups: int, dim: int, value_dim: int) -> list[Tensor]:
    """Keys and values as a fused projection leaves them: rows with something else in between."""
    q = randn(tokens, heads, dim, dtype=torch.bfloat16)
    fused = randn(tokens, groups * (dim + value_dim), dtype=torch.bfloat16, seed=1)
    k, v = fused.split((groups * dim, groups * value_dim), dim=-1)
    return [q, k.unflatten(-1, (groups, dim)), v.unflatten(-1, (groups, value_dim))]


def gradients(function, leaves: list[Tensor], spans, scores: Scores) -> list[Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves, spans, scores)
    return [out.detach(), *torch.autograd.grad(out, leaves, randn(*out.shape, dtype=out.dtype, seed=3))]


@pytest.mark.parametrize(("heads", "groups", "dim", "value_dim"), [(1, 1, 16, 16), (6, 2, 64, 64), (4, 4, 48, 80)])
@pytest.mark.parametrize("window", [None, 5, 300])
@pytest.mark.parametrize("case", LENGTHS)
def test_equal_to_exact_attention(case, window, heads, groups, dim, value_dim) -> None:
    spans = spans_of(LENGTHS[case])
    leaves, scores = inputs(spans[-1][1], heads, groups, dim, value_dim), Scores(dim**-0.5, window)
    assert document_bounds(*leaves, spans) is not None
    found = gradients(attention, leaves, spans, scores)
    exact = gradients(attention_reference, [leaf.float() for leaf in leaves], spans, scores)
    for name, ours, reference in zip(("out", "dq", "dk", "dv"), found, exact, strict=True):
        # With one key the gradients of q and k are zero but for rounding.
        scale = reference.norm().clamp_min(1e-3 * reference.numel() ** 0.5)
        assert float((ours.float() - reference).norm() / scale) < TOLERANCE, name


def test_as_close_as_the_block_path() -> None:
    spans = spans_of([100, 300, 170])
    leaves, scores = inputs(570, 6, 2, 64, 64), Scores(0.125)
    exact = gradients(attention_reference, [leaf.float() for leaf in leaves], spans, scores)
    found = gradients(attention, leaves, spans, scores)
    with using("torch"):
        eager = gradients(attention, leaves, spans, scores)
    for ours, theirs, reference in zip(found, eager, exact, strict=True):
        assert (ours.float() - reference).norm() < 1.1 * (theirs.float() - reference).norm()


@pytest.mark.parametrize("lengths", [[70, 600, 5, 130], [1300], [3000, 20]])
def test_the_number_of_threads_changes_nothing(lengths) -> None:
    spans, before = spans_of(lengths), torch.get_num_threads()
    leaves, found = inputs(sum(lengths), 6, 2, 64, 64), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gradients(attention, leaves, spans, Scores(0.125)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_documents_do_not_feel_each_other() -> None:
    """Bitwise: whatever another document holds, also NaN, leaves this one's output and gradients as they are."""
    spans, clean = spans_of([60, 90]), inputs(150, 4, 2, 32, 32)
    poisoned = [leaf.clone() for leaf in clean]
    for leaf in poisoned:
        leaf[60:] = float("nan")
    pairs = zip(*(gradients(attention, leaves, spans, Scores(0.2)) for leaves in (clean, poisoned)), strict=True)
    assert all(torch.equal(a[:60], b[:60]) for a, b in pairs)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v, s: (q, k, v, [(0, 8, 0, 20, 0)]),
        lambda q, k, v, s: (q, k, v, [(0, 20, 0, 20, 3)]),
        lambda q, k, v, s: (q.float(), k.float(), v.float(), s),
        lambda q, k, v, s: (q[..., :24], k[..., :24], v, s),
        lambda q, k, v, s: (q, k, v, [(0, 8, 0, 8, 0)]),
    ],
    ids=["a cache", "a prefix", "fp32", "a head of 24", "tokens left over"],
)
def test_what_goes_the_other_way(change) -> None:
    q, k, v = inputs(20, 4, 2, 32, 32)
    assert document_bounds(*change(q, k, v, [(0, 20, 0, 20, 0)])) is None
