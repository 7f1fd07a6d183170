"""Rows, documents, positions and the cache: four ways to say the same, equal to each other; and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from oarsmith.errors import ModelError
from oarsmith.models.layout import Layout
from oarsmith.models.spec_position import Rope

from .conftest import Case, tokens

Make = Callable[[str], Case]
NAMES = [
    "llama_gqa_head_dim",
    "llama_dynamic",
    "mistral",
    "gpt2",
    "gemma3",
    "phi3_long_partial",
    "olmo2",
    "granite",
    "smollm3_sliding",
    "starcoder2",
    "cohere_normed",
    "glm4_odd",
]
# Which rows an expert gets together follows the neighbours: sums over them are not bit for bit the same.
SPARSE = ["deepseek_v3", "gpt_oss", "mixtral_sliding", "qwen2_moe_mixed"]
# One matrix product over more rows may be blocked differently.
TOLERANCE = 2e-5


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", [*NAMES, *SPARSE])
@torch.no_grad()
def test_documents_are_alone(case: Make, name: str) -> None:
    model, ids = case(name).decoder(), tokens(2, 30)
    borders = [0, 7, 8, 30]
    found = model(ids, documents=borders)
    for row in range(2):
        for start, stop in pairwise(borders):
            close(found[row, start:stop], model(ids[row : row + 1, start:stop])[0])
    assert not torch.allclose(found[:, 8:], model(ids)[:, 8:])


@pytest.mark.parametrize("name", NAMES)
def test_a_neighbour_is_not_felt(case: Make, name: str) -> None:
    """Bitwise in the logits; the gradients of the weights both use agree to rounding."""
    results = []
    for other in (11, 12):
        model = case(name).decoder()
        ids = torch.cat((tokens(1, 9), tokens(1, 14, seed=other)), 1)
        logits = model(ids, documents=[0, 9, 23])[0, :9]
        logits.square().sum().backward()
        results.append((logits.detach(), model.layers[0].attention.qkv.weight.grad))
    assert torch.equal(results[0][0], results[1][0])
    # Weights are shared: rows with zero gradient from the neighbour still take part in the sum's order.
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama_gqa_head_dim", "gpt2"])
@torch.no_grad()
def test_positions(case: Make, name: str) -> None:
    made, ids = case(name), tokens(2, 12)
    model, oracle = made.decoder(), made.oracle()
    plain = torch.arange(12).repeat(2, 1)
    assert torch.equal(model(ids, positions=plain), model(ids))
    spread = plain * 2 + 5
    expected = torch.cat([oracle(ids[i : i + 1], position_ids=spread[i : i + 1]).logits for i in range(2)])
    torch.testing.assert_close(model(ids, positions=spread), expected, rtol=0, atol=1e-4)
    if name == "gpt2":
        assert not torch.allclose(model(ids, positions=plain + 5), model(ids))
    else:  # rope knows distances only
        torch.testing.assert_close(model(ids, positions=plain + 5), model(ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    ["llama_gqa_head_dim", "mistral", "gemma", "gpt2", "gemma3", "smollm3_sliding", "glm4_odd", "qwen2_moe_sliding"],
)
@torch.no_grad()
def test_cache_in_pieces_for_several_sequences(case: Make, name: str) -> None:
    """Prompts of different lengths in one call, then pieces of different lengths, one sequence sitting out."""
    model = case(name).decoder()
    rows = [tokens(20, seed=1), tokens(20, seed=2), tokens(20, seed=3)]
    expected = [model(row[None])[0] for row in rows]
    cache, seen = model.new_cache(3, 20), [0, 0, 0]
    for counts in ([5, 1, 9], [1, 1, 0], [0, 7, 3], [14, 1, 1]):
        chosen = [i for i in range(3) if counts[i] or sum(counts) == 2]  # once with a count of zero in the call
        pieces = [rows[i][seen[i] : seen[i] + counts[i]] for i in chosen]
        layout = cache.extend([counts[i] for i in chosen], chosen)
        logits = model.logits(model.hidden(torch.cat(pieces), layout, cache)).split([counts[i] for i in chosen])
        for i, found in zip(chosen, logits, strict=True):
            close(found, expected[i][seen[i] : seen[i] + counts[i]])
            seen[i] += counts[i]
    assert cache.used == seen


@torch.no_grad()
def test_a_full_cache_is_noticed(case: Make) -> None:
    cache = case("llama").decoder().new_cache(1, 4)
    cache.extend([3])
    with pytest.raises(AssertionError):
        cache.extend([2])


@torch.no_grad()
def test_the_same_call_twice(case: Make) -> None:
    model, ids = case("qwen3").decoder(), tokens(2, 33)
    assert torch.equal(model(ids), model(ids))


def test_layout_of_documents() -> None:
    layout = Layout.documents([0, 2, 5], torch.tensor([0, 1, 0, 1, 2]))
    assert [(s.q_start, s.q_stop, s.k_start, s.k_stop) for s in layout.spans] == [(0, 2, 0, 2), (2, 5, 2, 5)]
    assert layout.lengths_T.tolist() == layout.sizes_T.tolist() == [2, 2, 3, 3, 3]


def test_layout_of_positions_that_skip() -> None:
    """Rules that follow the length see how far positions reach; a document without tokens is no obstacle."""
    layout = Layout.documents([0, 2, 2, 5], torch.tensor([0, 9, 1, 0, 4]))
    assert layout.lengths_T.tolist() == [10, 10, 5, 5, 5]
    assert layout.prompts_T.tolist() == layout.sizes_T.tolist() == [2, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model(tokens(5)), "must be [B, T], got shape (5,)"),
        (lambda model: model(torch.empty(1, 0, dtype=torch.int64)), "input_ids is empty"),
        (lambda model: model(torch.tensor([[3, 101]])), "token id 101 is outside the vocabulary of 101"),
        (lambda model: model(torch.tensor([[3, -1]])), "token id -1 is outside"),
        (lambda model: model(tokens(1, 65)), "position 64 is outside the model's table of 64 positions"),
        (lambda model: model(tokens(1, 6), documents=[0, 5]), "documents [0, 5] do not run from 0 to 6"),
        (lambda model: model(tokens(1, 6), documents=[1, 6]), "documents [1, 6]"),
        (lambda model: model(tokens(1, 6), documents=[0, 4, 2, 6]), "documents [0, 4, 2, 6]"),
        (lambda model: model(tokens(1, 6), documents=[]), "documents []"),
        (lambda model: model(tokens(2, 6), positions=torch.arange(6)), "positions of shape (6,) do not fit"),
    ],
)
def test_refused_inputs(case: Make, call: Callable[[object], Tensor], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        call(case("gpt2").decoder())
    assert message in str(caught.value) and caught.value.fix


@torch.no_grad()
def test_an_empty_document(case: Make) -> None:
    model, ids = case("llama").decoder(), tokens(1, 6)
    close(model(ids, documents=[0, 3, 3, 6]), model(ids, documents=[0, 3, 6]))


def test_ropes_are_values() -> None:
    """The tables are made once per distinct rope, so equal ropes must be equal keys."""
    assert len({Rope(dim=4, theta=1e4), Rope(dim=4, theta=1e4), Rope(dim=4, theta=1e6)}) == 2
