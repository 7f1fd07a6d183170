"""LoKr: the change of W is a Kronecker product (Yeh et al. 2023, LyCORIS; KronA of Edalati et al. 2022).

W + alpha/r (W1 kron W2), with W1 [o, i] small and W2 [p, q] large, o p = O and i q = I; W2 (and with ``both`` W1) is
itself a product of rank r where that is smaller. PEFT's and PaddleNLP's method alike; in PaddleNLP an alpha of 0 is r.

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

from oarsmith.adapters.change import Change, Sitting, Size, Weight
from oarsmith.adapters.peft_config import PeftConfig
from oarsmith.config.adapters import AdapterKeys

_NAMES = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


def two_factors(number: int, factor: int) -> tuple[int, int]:
    """Two factors of a number, the smaller first unless it is the one asked for.

    Args:
        factor: the first one, or where it does not divide the number, the largest divisor below it; -1: as near to the
            square root as there is one.
    """
    if factor > 0 and number % factor == 0:
        return factor, number // factor
    most = math.isqrt(number) if factor == -1 else min(factor, math.isqrt(number))
    first = next(divisor for divisor in range(max(most, 1), 0, -1) if number % divisor == 0)
    return first, number // first


@dataclass(frozen=True, kw_only=True)
class Lokr(Change):
    """W1 (or its first factor) is zero at first."""

    keys: ClassVar[Mapping[str, str]] = {name: name for name in _NAMES}
    adds: ClassVar[bool] = True

    rank: int
    alpha: float
    both: bool = False
    factor: int = -1
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def shapes(self, size: Size) -> dict[str, tuple[int, ...]]:
        rows, columns = two_factors(size.out_features, self.factor), two_factors(size.in_features, self.factor)
        found: dict[str, tuple[int, ...]] = {}
        for name, height, width, may_split in zip(
            ("lokr_w1", "lokr_w2"), rows, columns, (self.both, True), strict=True
        ):
            if may_split and self.rank < max(height, width) / 2:
                found |= {f"{name}_a": (height, self.rank), f"{name}_b": (self.rank, width)}
            else:
                found[name] = (height, width)
        return found

    def reset(self, on: Sitting, generator: torch.Generator, weight: Weight) -> None:
        for name, tensor in on.tensors.items():
            if name in ("lokr_w1", "lokr_w1_a"):
                tensor.zero_()
            else:
                bound = 1 / math.sqrt(tensor.shape[1])
                tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator))

    def _left(self, on: Sitting) -> Tensor:
        """W1 with the scale."""
        whole = on["lokr_w1"] if "lokr_w1" in on.tensors else on["lokr_w1_a"] @ on["lokr_w1_b"]
        return whole * self.scale

    def added(self, on: Sitting, x_TI: Tensor, *, training: bool) -> Tensor:
        """(W1 kron W2) x without the product: x as a matrix [i, q] becomes W1 x W2^T."""
        w1_oi = self._left(on).to(x_TI.dtype)
        height, width = w1_oi.shape
        dropped_TI = functional.dropout(x_TI, self.dropout, training)
        x_Tiq = dropped_TI.unflatten(-1, (width, on.size.in_features // width))
        if "lokr_w2" not in on.tensors:
            a_pr, b_rq = on["lokr_w2_a"].to(x_TI.dtype), on["lokr_w2_b"].to(x_TI.dtype)
            return functional.linear(_left_product(w1_oi, functional.linear(x_Tiq, b_rq)), a_pr).flatten(-2)
        w2_pq = on["lokr_w2"].to(x_TI.dtype)
        rows, columns = w2_pq.shape
        if width * rows * (columns + height) <= height * columns * (width + rows):
            return _left_product(w1_oi, functional.linear(x_Tiq, w2_pq)).flatten(-2)
        return functional.linear(_left_product(w1_oi, x_Tiq), w2_pq).flatten(-2)

    def merged(self, on: Sitting, weight_OI: Tensor) -> Tensor:
        right = on["lokr_w2"] if "lokr_w2" in on.tensors else on["lokr_w2_a"] @ on["lokr_w2_b"]
        return weight_OI + torch.kron(self._left(on), right)

    def peft_config(self) -> dict[str, Any]:
        return {
            "peft_type": "LOKR",
            "r": self.rank,
            "alpha": self.alpha,
            "decompose_both": self.both,
            "decompose_factor": self.factor,
            "init_weights": True,
        }


def _left_product(w_oi: Tensor, x_Tiq: Tensor) -> Tensor:
    """W x of each token, as one matrix product."""
    return functional.linear(x_Tiq.transpose(-1, -2), w_oi).transpose(-1, -2)


def make_lokr(keys: AdapterKeys) -> Lokr:
    """LoKr as a configuration asks for it; without an alpha the scale is 1."""
    return Lokr(
        rank=keys.lora_rank,
        alpha=keys.lora_alpha or keys.lora_rank,
        both=keys.lokr_decompose_both,
        factor=keys.lokr_factor or -1,
        dropout=keys.lora_dropout,
    )


def read_lokr(config: PeftConfig, module: str, shapes: Mapping[str, tuple[int, ...]]) -> Lokr:
    """LoKr on a projection, from PEFT's file; its dropouts of ranks and modules act in training only."""
    config.refuse("modules_to_save")
    return Lokr(
        rank=config.rank_of(module),
        alpha=config.for_module("alpha", "alpha_pattern", module, 8.0),
        both=config.flag("decompose_both"),
        factor=config.whole("decompose_factor", -1, least=-1),
    )
