"""MoRA: a square matrix instead of two narrow ones, as high in rank as their parameters allow (Jiang et al. 2024).

The paper's type 6 (eq. 9): the input is cut into chunks of the matrix's width, each chunk is turned by the angles of
RoPE for its place and goes through the matrix, and the results lie side by side. It is PaddleNLP's ``use_mora``, of
which this is the forward pass (PaddleNLP's merge multiplies by the transpose of its matrix, which is another map). PEFT
does not have it: files have a type of their own, ``MORA``.

Shapes: T tokens, I in features, O out features, S side of the matrix, N chunks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.adapters.change import Change, Sitting, Size, Weight
from oarsmith.adapters.peft_config import PeftConfig
from oarsmith.adapters.tables import table
from oarsmith.config.adapters import AdapterKeys
from oarsmith.errors import ConfigError

_BASE = 10_000.0


def mora_side(size: Size, rank: int) -> int:
    """S: with as many parameters as LoRA of this rank, and even, because pairs are turned."""
    return int(math.sqrt((size.in_features + size.out_features) * rank) + 0.5) // 2 * 2


@table
def _angles(chunks: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine [N, S]."""
    speeds = _BASE ** -(torch.arange(0, side, 2).double() / side)
    angles = torch.outer(torch.arange(chunks).double(), speeds).repeat(1, 2)
    return angles.cos().float().to(device), angles.sin().float().to(device)


@dataclass(frozen=True, kw_only=True)
class Mora(Change):
    """M [S, S], which is zero at first. There is no scale."""

    keys: ClassVar[Mapping[str, str]] = {"matrix": "mora_M"}
    adds: ClassVar[bool] = True

    rank: int
    dropout: float = 0.0

    def shapes(self, size: Size) -> dict[str, tuple[int, ...]]:
        side = mora_side(size, self.rank)
        if side > 2 * size.in_features:
            raise ConfigError(
                f"MoRA of rank {self.rank} is a matrix of side {side} on a projection of {size.in_features} features: "
                "they would have to be repeated to fill it",
                where="lora_rank",
                fix="lower it",
            )
        return {"matrix": (side, side)}

    def reset(self, on: Sitting, generator: torch.Generator, weight: Weight) -> None:
        on["matrix"].zero_()

    def added(self, on: Sitting, x_TI: Tensor, *, training: bool) -> Tensor:
        side = len(on["matrix"])
        # Chunks beyond the output would be cut off. The last one may be filled up from the input's beginning.
        chunks = min(math.ceil(on.size.in_features / side), math.ceil(on.size.out_features / side))
        dropped_TI = functional.dropout(x_TI, self.dropout, training)
        if chunks * side > on.size.in_features:
            dropped_TI = torch.cat([dropped_TI, dropped_TI[..., : chunks * side - on.size.in_features]], -1)
        x_TNS = dropped_TI[..., : chunks * side].unflatten(-1, (chunks, side))
        cos_NS, sin_NS = (each.to(x_TI.dtype) for each in _angles(chunks, side, x_TI.device))
        first, second = x_TNS.chunk(2, -1)
        turned_TNS = x_TNS * cos_NS + torch.cat([-second, first], -1) * sin_NS
        y_TO = functional.linear(turned_TNS, on["matrix"].to(x_TI.dtype)).flatten(-2)
        if chunks * side < on.size.out_features:
            y_TO = torch.cat([y_TO] * math.ceil(on.size.out_features / (chunks * side)), -1)
        return y_TO[..., : on.size.out_features]

    def merged(self, on: Sitting, weight_OI: Tensor) -> Tensor:
        eye_II = torch.eye(on.size.in_features, device=weight_OI.device)
        return weight_OI + self.added(on, eye_II, training=False).t()

    def peft_config(self) -> dict[str, Any]:
        return {"peft_type": "MORA", "r": self.rank, "mora_dropout": self.dropout}


def make_mora(keys: AdapterKeys) -> Mora:
    """MoRA as a configuration asks for it."""
    return Mora(rank=keys.lora_rank, dropout=keys.lora_dropout)


def read_mora(config: PeftConfig, module: str, shapes: Mapping[str, tuple[int, ...]]) -> Mora:
    """MoRA on a projection, from a file."""
    config.refuse("modules_to_save")
    return Mora(rank=config.rank_of(module), dropout=config.share("mora_dropout"))
