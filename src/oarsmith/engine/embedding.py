"""Texts as vectors: the mean of the decoder's last hidden states.

Shapes: T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from oarsmith.models.decoder import Decoder
from oarsmith.models.layout import Layout

# Tokens that go through the decoder together.
_MOST_TOKENS = 4096


@torch.inference_mode()
def embed(model: Decoder, documents: Sequence[Sequence[int]]) -> list[list[float]]:
    """A vector [D] of length 1 for each document: the mean over its tokens of what the output matrix reads."""
    found: list[list[float]] = []
    batch: list[Sequence[int]] = []
    for ids in documents:
        if batch and sum(map(len, batch)) + len(ids) > _MOST_TOKENS:
            found += _embed(model, batch)
            batch = []
        batch.append(ids)
    return found + _embed(model, batch)


def _embed(model: Decoder, documents: Sequence[Sequence[int]]) -> list[list[float]]:
    device = model.device
    bounds = [0, *accumulate(map(len, documents))]
    positions_T = torch.cat([torch.arange(len(ids)) for ids in documents]).to(device)
    tokens_T = torch.tensor([token for ids in documents for token in ids], device=device)
    hidden_TD = model.hidden(tokens_T, Layout.documents(bounds, positions_T))
    hidden_TD = model.final(hidden_TD).float()
    vectors = [part_TD.mean(0) for part_TD in hidden_TD.split([len(ids) for ids in documents])]
    return [(vector_D / vector_D.norm().clamp_min(1e-12)).tolist() for vector_D in vectors]
