"""What ``test_triton_attention.py`` runs in a process of its own: by Triton's interpreter, or on a GPU where one is.

Every case is held against a softmax in float64; a model's steps against the same steps in plain PyTorch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from oarsmith import kernels
from oarsmith.kernels import Scores, SpanBounds, select, triton_attention, triton_programs
from oarsmith.kernels.attention import KeyRange, attention_reference
from tiny import tiny_decoder

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
# fp32: sums in another order. Else: probabilities and outputs of size about 1 rounded once each.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
SEED = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _products_of_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bf16 as the integers of its bits, and its dot multiplies those (Triton 3.9)."""
    if DEVICE.type == "cuda":
        return
    plain = interpreter.InterpreterBuilder.create_dot

    def dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = [builder.create_fp_ext(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b)]
        return plain(builder, *wide, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=SEED).to(DEVICE, dtype)


def exact(q: Tensor, k: Tensor, v: Tensor, spans: Sequence[SpanBounds], scores: Scores) -> Tensor:
    """Query by query and head by head, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.full((*q.shape[:2], v.shape[2]), torch.nan, dtype=torch.float64, device=q.device)
    share = q.shape[1] // k.shape[1]
    for q0, q1, k0, k1, prefix in spans:
        for query in range(q0, q1):
            own = (k1 - k0) - (q1 - query)
            first = 0 if scores.window is None else max(own - scores.window + 1, 0)
            keys = range(first, max(own + 1, min(prefix, k1 - k0)))
            for head in range(q.shape[1]):
                s = k[k0 + first : k0 + keys.stop, head // share] @ q[query, head] * scores.scale
                if scores.softcap is not None:
                    s = (s / scores.softcap).tanh() * scores.softcap
                if scores.bias_HP is not None:
                    bias = scores.bias_HP[head].double()
                    s = s + bias[first : keys.stop] - bias[own]
                if scores.sinks_H is not None:
                    s = torch.cat((s, scores.sinks_H[head : head + 1].double()))
                p = s.softmax(0)[: len(keys)]
                out[query, head] = p @ v[k0 + first : k0 + keys.stop, head // share]
    return out


def scattered(k: Tensor, v: Tensor, draw: random.Random) -> tuple[Tensor, Tensor, tuple[KeyRange, ...]]:
    """The keys in pieces anywhere in a store; what lies between them is not a number."""
    cuts = sorted({0, len(k), *(draw.randrange(len(k)) for _ in range(len(k) // 4))})
    stores = [torch.full((2 * len(k) + 8, *x.shape[1:]), torch.nan, dtype=x.dtype, device=x.device) for x in (k, v)]
    ranges, slot = [], 0
    for start, stop in draw.sample(list(pairwise(cuts)), len(cuts) - 1):
        slot += draw.randrange(2)
        ranges.append((start, stop, slot))
        for store, x in zip(stores, (k, v), strict=True):
            store[slot : slot + stop - start] = x[start:stop]
        slot += stop - start
    return stores[0], stores[1], tuple(sorted(ranges))


def check(
    q: Tensor, k: Tensor, v: Tensor, spans: Sequence[SpanBounds], scores: Scores, draw: random.Random | None = None
) -> None:
    expected = exact(q, k, v, spans, scores)
    arguments = (k, v, None) if draw is None else scattered(k, v, draw)
    assert triton_attention.covers(q, *arguments[:2], scores)
    found = triton_attention.attention(q, *arguments[:2], spans, scores, arguments[2])
    assert found.dtype == q.dtype and found.shape == expected.shape
    limit = TOLERANCE[q.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=limit, atol=limit)
    if q.dtype == torch.float32:
        torch.testing.assert_close(found, attention_reference(q, k, v, spans, scores), rtol=2 * limit, atol=2 * limit)


@pytest.fixture(params=[1, 3], ids=["whole", "split"])
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(triton_attention, "num_splits", lambda *_: request.param)
    return request.param


# A prompt's beginning, a piece over a cache, single tokens, several guessed tokens, an empty span.
MIXED = [(0, 11, 0, 11, 0), (11, 18, 11, 71, 0), (18, 19, 71, 141, 0), (19, 19, 141, 141, 0), (19, 22, 141, 150, 0)]


def rule(name: str, heads: int) -> Scores:
    slopes = torch.tensor([2.0**-i for i in range(heads)], device=DEVICE)
    return {
        "plain": Scores(0.4),
        "window": Scores(0.4, window=7),
        "window of one": Scores(0.4, window=1),
        "soft cap": Scores(0.4, softcap=1.5),
        "bias": Scores(0.4, bias_HP=slopes[:, None] * torch.arange(200.0, device=DEVICE)),
        "sinks": Scores(0.4, sinks_H=normal(heads, dtype=torch.bfloat16) * 3),
        "sinks and window": Scores(0.4, window=9, sinks_H=normal(heads)),
    }[name]


RULES = ["plain", "window", "window of one", "soft cap", "bias", "sinks", "sinks and window"]


@pytest.mark.parametrize("name", RULES)
def test_rules(name: str, splits: int) -> None:
    q, k, v = normal(22, 4, 16), normal(150, 2, 16), normal(150, 2, 16)
    check(q, k, v, MIXED, rule(name, 4), random.Random(splits))


@pytest.mark.parametrize("name", ["plain", "window"])
def test_prefixes(name: str, splits: int) -> None:
    spans = [(0, 9, 0, 9, 5), (9, 12, 9, 30, 20), (12, 20, 30, 38, 8), (20, 21, 38, 60, 4), (21, 25, 60, 64, 9)]
    check(normal(25, 2, 16), normal(64, 1, 16), normal(64, 1, 16), spans, rule(name, 2), random.Random(0))


def test_a_prefix_that_ends_behind_a_tile() -> None:
    """The first tile's queries see keys of the prefix that come after all of them."""
    spans, scores = [(0, 30, 0, 33, 31)], Scores(0.4)
    q, k, v = normal(30, 6, 16), normal(33, 1, 16), normal(33, 1, 16)
    check(q, k, v, spans, scores, random.Random(0))
    (group,) = triton_attention._groups(tuple(spans), triton_attention.Sizes(6, 16, 16, 4), q.device)
    assert len(group.table) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "soft cap", "sinks and window"])
def test_16_bits(name: str, dtype: torch.dtype) -> None:
    q, k, v = normal(22, 4, 16, dtype=dtype), normal(150, 2, 16, dtype=dtype), normal(150, 2, 16, dtype=dtype)
    check(q, k, v, MIXED, rule(name, 4), random.Random(1))


@pytest.mark.parametrize(
    ("heads", "groups", "dim", "value_dim"),
    [(1, 1, 3, 5), (6, 2, 40, 40), (9, 3, 80, 24), (5, 1, 96, 64), (3, 3, 20, 130), (40, 2, 24, 16), (70, 1, 16, 16)],
)
def test_dimensions(heads: int, groups: int, dim: int, value_dim: int) -> None:
    """No power of two anywhere; more heads than a tile has rows."""
    spans = [(0, 3, 0, 3, 0), (3, 4, 3, 30, 0), (4, 9, 30, 48, 0)]
    q, k, v = normal(9, heads, dim) * dim**-0.25, normal(48, groups, dim), normal(48, groups, value_dim)
    check(q, k, v, spans, Scores(dim**-0.5), random.Random(2))


def test_latents(splits: int) -> None:
    """Values are the first part of the keys, as multi-head latent attention has it."""
    latents = normal(40, 1, 576, dtype=torch.bfloat16)
    q, spans = normal(4, 24, 576, dtype=torch.bfloat16), [(0, 1, 0, 30, 0), (1, 4, 30, 40, 0)]
    check(q, latents, latents[..., :512], spans, Scores(576**-0.5))


def test_slices_of_a_fused_projection() -> None:
    q, k, v = normal(17, 64).split((32, 16, 16), dim=-1)
    views = q.unflatten(-1, (4, 8)), k.unflatten(-1, (2, 8)), v.unflatten(-1, (2, 8))
    check(*views, [(0, 6, 0, 6, 0), (6, 17, 6, 17, 0)], Scores(0.3, 4))


@pytest.mark.parametrize("seed", range(12))
def test_anything(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    if draw.random() < 0.5:
        count = draw.randint(2, 5)
        monkeypatch.setattr(triton_attention, "num_splits", lambda *_: count)
    groups = draw.randint(1, 3)
    heads, dim, value_dim = groups * draw.randint(1, 5), draw.randint(1, 50), draw.randint(1, 50)
    spans, query, key = [], 0, 0
    for _ in range(draw.randint(1, 4)):
        queries = draw.choice([1, 1, draw.randint(0, 30)])
        keys = queries + draw.choice([0, draw.randint(0, 60)])
        spans.append((query, query + queries, key, key + keys, draw.choice([0, 0, draw.randint(0, keys)])))
        query, key = query + queries, key + keys
    dtype = draw.choice([torch.float32, torch.float32, torch.bfloat16])
    if key == 0:
        return
    q, k = normal(query, heads, dim, dtype=dtype), normal(key, groups, dim, dtype=dtype)
    v = normal(key, groups, value_dim, dtype=dtype)
    scores = rule(draw.choice(RULES), heads)._replace(scale=dim**-0.5)
    check(q, k, v, spans, scores, draw if draw.random() < 0.7 else None)


def test_a_nan_does_not_vanish(splits: int) -> None:
    for which in range(3):
        tensors = [normal(9, 2, 8), normal(9, 1, 8), normal(9, 1, 8)]
        tensors[which][4] = torch.nan
        out = triton_attention.attention(*tensors, [(0, 9, 0, 9, 0)], Scores(0.5))
        assert out[4].isnan().all()
        assert which == 0 or out[5:].isnan().all()


def test_scores_that_are_large_or_infinite(splits: int) -> None:
    """A key that can never be chosen counts nothing; an infinite score is as broken as in PyTorch."""
    q, k, v = normal(3, 1, 2).abs(), normal(3, 1, 2).abs(), normal(3, 1, 2)
    q[1], k[1] = q[1] * 1e4, -torch.inf
    span = [(0, 3, 0, 3, 0)]
    found, expected = triton_attention.attention(q, k, v, span, Scores(0.5)), exact(q, k, v, span, Scores(0.5))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    k[1] = torch.inf
    assert triton_attention.attention(q, k, v, span, Scores(0.5))[2].isnan().all()


def test_scores_that_rise() -> None:
    """Each turn of the loop finds a higher score: what came before is scaled down."""
    q, k, v = normal(2, 2, 16).abs(), normal(200, 1, 16).abs(), normal(200, 1, 16)
    k *= torch.linspace(0.1, 1, 200, device=DEVICE)[:, None, None]
    check(q, k, v, [(0, 2, 0, 200, 0)], Scores(0.3))


def test_nothing_to_do() -> None:
    assert triton_attention.attention(normal(0, 2, 4), normal(3, 1, 4), normal(3, 1, 6), [], Scores(1.0)).shape == (
        0,
        2,
        6,
    )


def test_tables_are_made_once_a_step() -> None:
    q, k, v = normal(2, 2, 16), normal(40, 1, 16), normal(40, 1, 16)
    ranges = ((0, 20, 20), (20, 30, 0))
    for cache in (triton_attention._slots, triton_attention._groups):
        cache.cache_clear()
    for _ in range(3):
        spans = [(0, 1, 0, 10, 0), (1, 2, 10, 30, 0)]  # as each layer makes them
        triton_attention.attention(q, k, v, spans, Scores(0.3), ranges)
    assert triton_attention._slots.cache_info().misses == triton_attention._groups.cache_info().misses == 1
    other = tuple((start, stop, slot + 1 - 1) for start, stop, slot in ranges)
    triton_attention.attention(q, k, v, spans, Scores(0.3), other)
    assert triton_attention._slots.cache_info().misses == 2


MODELS = {
    "llama": {},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 7},
    "latents": {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 8,
        "v_head_dim": 6,
        "first_k_dense_replace": 2,
    },
}


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_a_model_over_pages(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in pieces beside single tokens, through the decoder and its paged cache."""
    model = tiny_decoder(**MODELS[name]).to(DEVICE)
    calls = []
    attend = triton_programs.attend

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            calls.append(grid)
            return attend[grid]

    def steps() -> list[Tensor]:
        cache = model.new_cache(2, 4, num_pages=20)
        pages = random.Random(3).sample(range(20), 20)
        cache.pages = [pages[:10], pages[10:]]
        ids, out = torch.arange(1, 60, device=DEVICE), []
        for counts in ((9, 4), (6, 1), (1, 1), (1, 12)):
            used, ids = ids[: sum(counts)], ids[sum(counts) :]
            out.append(model.hidden(used, cache.extend(counts, [0, 1]), cache))
        return out

    with kernels.using("torch"):
        expected = steps()
    monkeypatch.setattr(select, "_on_gpu", lambda _: True)
    monkeypatch.setattr(triton_programs, "attend", Counted())
    found = steps()
    assert len(calls) >= 2 * 4, "every layer of every step"
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
