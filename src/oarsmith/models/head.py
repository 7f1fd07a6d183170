"""The last hidden state to logits. Shapes: N chosen tokens, D hidden, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from oarsmith.models.linear import build_linear
from oarsmith.models.spec import HeadSpec


class Head(nn.Module):
    """``weight`` [V, D] is its own matrix, or [S, D] for scores; a tied head has none and gets the embedding table."""

    def __init__(self, spec: HeadSpec, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.projection = build_linear(spec.projection) if spec.projection is not None else None
        size = hidden_size if spec.projection is None else spec.projection.out_features
        num_rows = vocab_size if spec.num_scores is None else spec.num_scores
        self.weight = None if spec.tied else nn.Parameter(torch.empty(num_rows, size))

    def inputs(self, hidden_ND: Tensor) -> Tensor:
        """What the matrix is multiplied with. The logits' scale goes in here: it is one number a row."""
        if self.projection is not None:
            hidden_ND = self.projection(hidden_ND)
        return hidden_ND if self.spec.scale == 1.0 else hidden_ND * self.spec.scale

    def matrix(self, table_VD: Tensor) -> Tensor:
        """The output matrix."""
        weight_VD = table_VD if self.weight is None else self.weight
        return functional.normalize(weight_VD) if self.spec.normalized else weight_VD

    def bend(self, logits_NV: Tensor) -> Tensor:
        """The soft cap."""
        cap = self.spec.softcap
        return logits_NV if cap is None else (logits_NV / cap).tanh() * cap
