"""Shifted sparse attention against the groups of the paper written as a dense mask, in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from oarsmith import kernels
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.errors import ModelError
from oarsmith.kernels import Scores
from oarsmith.models import families
from oarsmith.models.attention import attend
from oarsmith.models.decoder import Decoder
from oarsmith.models.layout import Layout, Span
from oarsmith.models.shifted import ShiftedSparse
from oarsmith.models.spec_position import alibi_slopes
from tiny import CONFIGS, tiny_decoder

from .conftest import tokens
from .test_cache import FAMILIES, document

BACKENDS = ["auto", "torch"]


def visible(bounds: list[int], ratio: float, shifted: bool) -> Tensor:
    """[T, T] from the definition: same document, same group, not in the future. Groups are numbered token by token."""
    group = []
    for number, (start, stop) in enumerate(pairwise(bounds)):
        size = math.ceil((stop - start) * ratio)
        shift = size - size // 2 if shifted and size > 1 else 0
        group += [(number, (index + shift) // size) for index in range(stop - start)]
    order = torch.arange(bounds[-1])
    same = torch.tensor([[a == b for b in group] for a in group])
    return same & (order[None] <= order[:, None])


def reference(q: Tensor, k: Tensor, v: Tensor, bounds: list[int], ratio: float, scores: Scores) -> Tensor:
    """Head by head in float64 with a dense mask."""
    share, outputs = q.shape[1] // k.shape[1], []
    order = torch.arange(len(q))
    for head in range(q.shape[1]):
        mask = visible(bounds, ratio, shifted=head >= q.shape[1] // 2)
        s = q[:, head].double() @ k[:, head // share].double().t() * scores.scale
        if scores.softcap is not None:
            s = (s / scores.softcap).tanh() * scores.softcap
        if scores.window is not None:
            mask = mask & (order[:, None] - order[None] < scores.window)
        if scores.bias_HP is not None:
            slope = (scores.bias_HP[head, 1] - scores.bias_HP[head, 0]).double()
            s = s + slope * (order[None] - order[:, None])
        s = s.masked_fill(~mask, -torch.inf)
        if scores.sinks_H is not None:
            s = torch.cat((s, scores.sinks_H[head].double().expand(len(q), 1)), 1)
        outputs.append(s.softmax(-1)[:, : len(q)] @ v[:, head // share].double())
    return torch.stack(outputs, 1)


# Documents of one token, shorter than 1 / ratio, divisible, with a rest.
BOUNDS = [0, 1, 4, 20, 51]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio", [0.25, 0.3, 1.0])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (8, 1), (9, 3), (5, 1), (6, 3), (2, 1)])
def test_dense_mask(heads: int, groups: int, ratio: float, backend: kernels.select.Backend) -> None:
    """Outputs and gradients, for kv heads that split into halves and for those that do not."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(51, n, 6, generator=generator).requires_grad_() for n in (heads, groups, groups)]
    d_out = torch.randn(51, heads, 6, generator=generator)
    layout = ShiftedSparse(ratio).apply(Layout.documents(BOUNDS, torch.zeros(51, dtype=torch.int64)))
    expected = reference(*leaves, BOUNDS, ratio, Scores(0.4))
    with kernels.using(backend):
        found = attend(*leaves, layout, Scores(0.4))
        grads = torch.autograd.grad(found, leaves, d_out)
    # fp32 against float64.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    for have, want in zip(grads, torch.autograd.grad(expected, leaves, d_out.double()), strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["window", "softcap", "alibi", "sinks"])
def test_scores_of_each_half(kind: str, backend: kernels.select.Backend) -> None:
    """What belongs to a head stays with it: ALiBi's slopes and the sinks."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(51, n, 6, generator=generator) for n in (4, 2, 2))
    bias = torch.tensor(alibi_slopes(4))[:, None] * torch.arange(31)
    scores = {
        "window": Scores(0.4, window=3),
        "softcap": Scores(0.4, softcap=0.7),
        "alibi": Scores(0.4, bias_HP=bias),
        "sinks": Scores(0.4, sinks_H=torch.randn(4, generator=generator)),
    }[kind]
    layout = ShiftedSparse().apply(Layout.documents(BOUNDS, torch.zeros(51, dtype=torch.int64)))
    with kernels.using(backend):
        found = attend(q, k, v, layout, scores)
    torch.testing.assert_close(found.double(), reference(q, k, v, BOUNDS, 0.25, scores), rtol=0, atol=1e-5)


def test_groups() -> None:
    """16 tokens: groups of 4, and the same shifted by 2 with both ends by themselves."""
    halves = ShiftedSparse().apply(Layout.documents([0, 16], torch.arange(16))).halves
    assert halves is not None
    bounds = [[(span.q_start, span.q_stop) for span in spans] for spans in halves]
    assert bounds[0] == [(0, 4), (4, 8), (8, 12), (12, 16)]
    assert bounds[1] == [(0, 2), (2, 6), (6, 10), (10, 14), (14, 16)]


def test_prefix_of_a_document_is_split_with_it() -> None:
    layout = Layout.documents([0, 16], torch.arange(16))
    layout = Layout(layout.pieces, (Span(0, 16, 0, 16, 6),), layout.positions_T, layout.lengths_T, layout.prompts_T)
    halves = ShiftedSparse().apply(layout).halves
    assert halves is not None
    assert [[span.prefix for span in spans] for spans in halves] == [[4, 2, 0, 0], [2, 4, 0, 0, 0]]


@pytest.mark.parametrize("family", CONFIGS)
def test_no_token_sees_the_future(family: str) -> None:
    """The authors' roll would let the first half group see the last tokens. Two layers, every head, in training."""
    model = tiny_decoder(family).train()
    model.shifted = ShiftedSparse()
    ids = tokens(1, 32)
    with torch.no_grad():
        before = model(ids)
        for changed in (1, 17, 31):
            other = ids.clone()
            other[0, changed] += 1
            moved = (model(other) - before)[0].abs().amax(-1)
            assert not moved[:changed].any() and moved[changed] > 0


@pytest.mark.parametrize("name", ["yuan2_2b", "chatglm_6b", "chatglm2_6b", "deepseek_v3", "baichuan_13b", "gemma2"])
def test_every_attention(name: str) -> None:
    """Latent, filtered and prefix attention: packed documents get the loss they get alone, and gradients come."""
    model = load_decoder(FAMILIES / name, dtype=torch.float32).train()
    parts = [document(name, length, length) for length in (14, 21)]
    full = model(parts[1][None])
    model.shifted = ShiftedSparse()
    alone = [model(ids[None])[0] for ids in parts]
    packed = model(torch.cat(parts)[None], documents=[0, 14, 35])[0]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=5e-5)
    assert not torch.allclose(alone[1], full[0], atol=1e-3), "it is not full attention"
    packed.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_off_at_inference() -> None:
    model, ids = tiny_decoder().eval(), tokens(1, 32)
    with torch.no_grad():
        expected = model(ids)
        model.shifted = ShiftedSparse()
        assert torch.equal(model(ids), expected)
        assert not torch.allclose(model.train()(ids), expected, atol=1e-3)


def test_one_head_is_refused() -> None:
    config = {**CONFIGS["llama"], "num_attention_heads": 1, "num_key_value_heads": 1}
    with pytest.raises(ModelError, match="two heads or more"):
        ShiftedSparse.require(families.build_spec(config)[1])
    ShiftedSparse.require(Decoder(families.build_spec(CONFIGS["llama"])[1], CONFIGS["llama"]).spec)
