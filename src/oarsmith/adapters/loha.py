"""LoHa: the change of W is an elementwise product of two low-rank matrices (Hyeon-Woo et al. 2022, FedPara; LyCORIS).

W + alpha/r (A1 B1) * (A2 B2), of rank up to r^2.

Shapes: T tokens, I in features, O out features, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.adapters.change import Delta, Sitting, Size, Weight
from oarsmith.adapters.peft_config import PeftConfig
from oarsmith.config.adapters import AdapterKeys

_NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@dataclass(frozen=True, kw_only=True)
class Loha(Delta):
    """A1, A2 [O, r], B1 and B2 [r, I], of which B2 is zero at first."""

    keys: ClassVar[Mapping[str, str]] = {name: name for name in _NAMES}

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def shapes(self, size: Size) -> dict[str, tuple[int, ...]]:
        tall, wide = (size.out_features, self.rank), (self.rank, size.in_features)
        return dict(zip(_NAMES, (tall, wide, tall, wide), strict=True))

    def reset(self, on: Sitting, generator: torch.Generator, weight: Weight) -> None:
        for name in _NAMES[:3]:
            bound = 1 / math.sqrt(on[name].shape[1])
            on[name].copy_(torch.empty(on[name].shape).uniform_(-bound, bound, generator=generator))
        on["hada_w2_b"].zero_()

    def delta(self, on: Sitting) -> Tensor:
        first, second = on["hada_w1_a"] @ on["hada_w1_b"], on["hada_w2_a"] @ on["hada_w2_b"]
        return first * second * self.scale

    def added(self, on: Sitting, x_TI: Tensor, *, training: bool) -> Tensor | None:
        """Through r^2 products of a column of A1 with one of A2, and rows of B1 with rows of B2, where those are less
        than the whole matrix."""
        rows, columns, rank = on.size.out_features, on.size.in_features, self.rank**2
        if rank * (rows + columns) >= rows * columns:
            return super().added(on, x_TI, training=training)
        a_OR = (on["hada_w1_a"][:, :, None] * on["hada_w2_a"][:, None, :] * self.scale).flatten(1)
        b_RI = (on["hada_w1_b"][:, None] * on["hada_w2_b"][None]).flatten(0, 1)
        dropped_TI = functional.dropout(x_TI, self.dropout, training)
        return functional.linear(functional.linear(dropped_TI, b_RI.to(x_TI.dtype)), a_OR.to(x_TI.dtype))

    def peft_config(self) -> dict[str, Any]:
        return {"peft_type": "LOHA", "r": self.rank, "alpha": self.alpha, "init_weights": True}


def make_loha(keys: AdapterKeys) -> Loha:
    """LoHa as a configuration asks for it; without an alpha the scale is 1."""
    return Loha(rank=keys.lora_rank, alpha=keys.lora_alpha or keys.lora_rank, dropout=keys.lora_dropout)


def read_loha(config: PeftConfig, module: str, shapes: Mapping[str, tuple[int, ...]]) -> Loha:
    """LoHa on a projection, from PEFT's file; its dropouts of ranks and modules act in training only."""
    config.refuse("modules_to_save")
    return Loha(rank=config.rank_of(module), alpha=config.for_module("alpha", "alpha_pattern", module, 8.0))
