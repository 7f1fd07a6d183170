"""NEFTune's noise on the embeddings (Jain et al. 2023, algorithm 1)."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from oarsmith.models.layout import Layout
from tiny import tiny_decoder

from .conftest import tokens

BOUNDS = (0, 400, 401, 500)


def layout(bounds: tuple[int, ...] = BOUNDS) -> Layout:
    return Layout.documents(bounds, torch.arange(bounds[-1]) % 100)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_noise_of_each_document(family: str) -> None:
    """Uniform within +- alpha / sqrt(L d), L the document's own length; Gemma's scale holds for it too."""
    model, ids = tiny_decoder(family), tokens(500)
    torch.manual_seed(0)
    noise = model.embedding(ids, layout(), 5.0) - model.embedding(ids, layout())
    scale = model.embedding.spec.scale or 1.0
    for start, stop in pairwise(BOUNDS):
        part, limit = noise[start:stop] / scale, 5.0 / math.sqrt((stop - start) * 32)
        # fp32 sums with embeddings of size 1.
        assert part.abs().max() <= limit + 1e-6
        if stop - start > 1:
            # 3,168 draws or more: the largest is within 1 % of the limit, the deviation within 5 % of limit / sqrt(3).
            assert part.abs().max() > 0.99 * limit
            assert float(part.std()) == pytest.approx(limit / math.sqrt(3), rel=0.05)
            assert abs(float(part.mean())) < 0.05 * limit


@torch.no_grad()
def test_only_in_training_and_keyed_by_the_global_generator() -> None:
    model, ids = tiny_decoder(), tokens(1, 30)
    plain = model.eval()(ids)
    model.neftune_alpha = 5.0
    assert torch.equal(model(ids), plain)
    model.train()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(model(ids))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=1e-3) and not torch.allclose(found[0], plain, atol=1e-3)


def test_gradient_is_that_of_the_noisy_rows() -> None:
    """Noise is a constant: the gradient of a sum over the rows stays the count of each token."""
    model, ids = tiny_decoder(), tokens(500)
    model.embedding(ids, layout(), 5.0).sum().backward()
    counts = torch.bincount(ids, minlength=1120).float()
    assert torch.equal(model.embedding.weight.grad, counts[:, None].expand(-1, 32))
