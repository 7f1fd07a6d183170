"""Token ids to the first hidden state. Shapes: T tokens, V vocabulary, E table row, D hidden."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from oarsmith.errors import ModelError
from oarsmith.models.layout import Layout
from oarsmith.models.linear import build_linear
from oarsmith.models.norm import build_norm
from oarsmith.models.part import Part
from oarsmith.models.spec import EmbeddingSpec, LearnedPositions


class Embedding(nn.Module):
    """``weight`` [V, E] is the table; a tied head uses it too."""

    def __init__(self, spec: EmbeddingSpec, vocab_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(vocab_size, spec.size))
        self.positions = PositionEmbedding(spec) if spec.positions is not None else None
        self.norm = build_norm(spec.norm) if spec.norm is not None else None
        self.projection = build_linear(spec.projection) if spec.projection is not None else None

    def forward(
        self, ids_T: Tensor, layout: Layout, neftune_alpha: float | None = None, parts: Sequence[Part] = ()
    ) -> Tensor:
        """``parts``: those that have a say; with them ids may be those of virtual tokens."""
        x_TE = functional.embedding(ids_T.clamp_min(0) if parts else ids_T, self.weight, self.spec.padding_id)
        for part in parts:
            x_TE = part.looked_up(ids_T, x_TE)
        if neftune_alpha is not None:
            x_TE = x_TE + neftune_noise(x_TE, layout, neftune_alpha)
        if self.spec.scale is not None:
            # Rounded to the stream's dtype first, as the authors do: in bf16 the rounding is part of the model.
            x_TE = x_TE * torch.tensor(self.spec.scale, dtype=x_TE.dtype, device=x_TE.device)
        for part in parts:
            x_TE = part.embedded(ids_T, x_TE)
        if self.projection is not None:
            x_TE = self.projection(x_TE)
        if self.positions is not None:
            x_TE = x_TE + self.positions(layout.positions_T)
        return x_TE if self.norm is None else self.norm(x_TE)


def neftune_noise(x_TE: Tensor, layout: Layout, alpha: float) -> Tensor:
    """Uniform noise within +- alpha / sqrt(L E) for each token of a document of L tokens, from the global generator.

    NEFTune (Jain et al. 2023), algorithm 1. It goes on the rows of the table, before a model scales or norms them.
    """
    noise_TE = torch.empty(x_TE.shape, device=x_TE.device).uniform_(-1.0, 1.0)
    size_T = alpha / (layout.sizes_T * x_TE.shape[1]).sqrt()
    return (noise_TE * size_T[:, None]).to(x_TE.dtype)


class PositionEmbedding(nn.Module):
    """A learned vector for each position. Shapes: T tokens, D hidden."""

    def __init__(self, spec: EmbeddingSpec) -> None:
        super().__init__()
        assert spec.positions is not None
        self.spec: LearnedPositions = spec.positions
        size = spec.size if spec.projection is None else spec.projection.out_features
        self.weight = nn.Parameter(torch.empty(self.spec.offset + self.spec.size, size))

    def forward(self, positions_T: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and (highest := int(positions_T.max())) >= self.spec.size:
            raise ModelError(
                f"position {highest} is outside the model's table of {self.spec.size} positions",
                fix=f"shorten the input to at most {self.spec.size} tokens",
            )
        return functional.embedding(positions_T + self.spec.offset, self.weight)
