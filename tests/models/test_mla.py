"""Latent attention: the cache of latents, with and without a bottleneck on queries, says what no cache says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from oarsmith.adapters.linear import attach
from oarsmith.adapters.lora import Lora
from oarsmith.adapters.targets import adapt_rewrite
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.models.decoder import Decoder
from oarsmith.models.spec_parts import MLA
from random_adapter import randomise

from .conftest import Case, tokens

Make = Callable[[str], Case]
NAMES = ["deepseek_v2_lite", "deepseek_v2", "deepseek_v3", "deepseek_v3_half"]
CHUNKS = [[11, 8, 6], [20, 1, 1, 1, 1, 1], [1] * 25, [2, 23]]
# Sums over the latent dim in place of sums over the head dim.
TOLERANCE = 1e-4


@torch.no_grad()
def in_chunks(model: Decoder, rows: list[Tensor], chunks: list[int]) -> list[Tensor]:
    """Logits of rows that run side by side, a chunk of each in every call; the second lags one token behind."""
    cache, found = model.new_cache(len(rows), len(rows[0])), [[] for _ in rows]
    start = 0
    for count in chunks:
        pieces = [row[max(start - lag, 0) : start + count - lag] for lag, row in enumerate(rows)]
        layout = cache.extend([len(piece) for piece in pieces])
        logits = model.logits(model.hidden(torch.cat(pieces), layout, cache))
        for sequence, part in zip(found, logits.split([len(piece) for piece in pieces]), strict=True):
            sequence.append(part)
        start += count
    return [torch.cat(parts) for parts in found]


@pytest.mark.parametrize("chunks", CHUNKS, ids=len)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_any_chunking(case: Make, name: str, chunks: list[int]) -> None:
    model = case(name).decoder()
    attention = model.spec.layers[0].attention
    assert isinstance(attention, MLA) and attention.v_dim != attention.nope_dim + attention.rope_dim
    assert (attention.q_down is None) == (name == "deepseek_v2_lite")
    rows = [tokens(25, seed=1), tokens(25, seed=2)]
    for row, found in zip(rows, in_chunks(model, rows, chunks), strict=True):
        torch.testing.assert_close(found, model(row[None])[0, : len(found)], rtol=0, atol=TOLERANCE)


def with_lora_on(name: str, made: Case) -> Decoder:
    """LoRA of rank 2 with random B on one projection of every layer."""

    def choose(modules: list[str]) -> dict[str, Lora]:
        return {module: Lora(rank=2, alpha=3.0) for module in modules if module.endswith(name)}

    model = load_decoder(made.path, rewrite=adapt_rewrite(choose)).eval()
    attach(model, seed=0)
    randomise(model, 0.3)
    return model


@pytest.mark.parametrize("projection", ["kv_b_proj", "kv_a_proj_with_mqa"])
@torch.no_grad()
def test_with_an_adapter(case: Make, projection: str) -> None:
    """A rewritten ``kv_up`` has no plain weight to move to the queries: the latents are expanded in place of that."""
    model, plain, row = with_lora_on(projection, case("deepseek_v3")), case("deepseek_v3").decoder(), tokens(25)
    expected = model(row[None])[0]
    assert (expected - plain(row[None])[0]).abs().max() > 0.1
    (found,) = in_chunks(model, [row], [9, 1, 1, 14])
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_bf16_stays_near(case: Make) -> None:
    """The cached path rounds other products than the expanded one: its error is of the same size."""
    made, rows = case("deepseek_v3"), [tokens(25, seed=seed) for seed in range(2)]
    exact, narrow = made.decoder(), load_decoder(made.path, dtype=torch.bfloat16).eval()
    wanted = [exact(row[None])[0] for row in rows]
    plain = [narrow(row[None])[0].float() for row in rows]
    cached = [found.float() for found in in_chunks(narrow, rows, [9] + [1] * 16)]

    def error(found: list[Tensor]) -> float:
        pairs = zip(found, wanted, strict=True)
        return float(torch.cat([(a - b[: len(a)]).flatten() for a, b in pairs]).square().mean().sqrt())

    assert 0 < error(cached) < 1.5 * error(plain)


@torch.no_grad()
def test_the_cache_holds_latents_only(case: Make) -> None:
    """12 + 8 numbers a token and layer, whatever the number of heads (section 2.1.2)."""
    shapes = [block.attention.cache_shape for block in case("deepseek_v3").decoder().blocks()]
    assert {shape.slots for shape in shapes} == {((20,),)} and {shape.state for shape in shapes} == {None}
