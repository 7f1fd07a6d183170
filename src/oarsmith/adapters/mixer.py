"""MoSLoRA (Wu et al. 2024): a trained mixer between LoRA's two matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from oarsmith.adapters.change import Sitting, Size, Weight
from oarsmith.adapters.lora import LORA_KEYS, Lora, alpha_of
from oarsmith.config.adapters import AdapterKeys

_A, _B = LORA_KEYS["lora_A"], LORA_KEYS["lora_B"]
_MIXER, _UNMIXED = "lora_mixer", "unmixed_A"


@dataclass(frozen=True, kw_only=True)
class Mixed(Lora):
    """W + scale B M A with M [r, r], which begins as the suite's and the paper's do (Kaiming uniform).

    PEFT has no such method. A file holds M A for A, so that anything reads it as the LoRA it is; what trains on needs
    the two apart, and finds them in a file beside it.
    """

    keys: ClassVar[Mapping[str, str]] = LORA_KEYS

    def shapes(self, size: Size) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(size), _MIXER: (self.rank, self.rank)}

    def reset(self, on: Sitting, generator: torch.Generator, weight: Weight) -> None:
        super().reset(on, generator, weight)
        bound = 1 / math.sqrt(self.rank)
        on[_MIXER].copy_(torch.empty(self.rank, self.rank).uniform_(-bound, bound, generator=generator))

    def factors(self, on: Sitting) -> tuple[Tensor, Tensor]:
        return on[_MIXER] @ on["lora_A"], on["lora_B"] * self.scale

    def stored(self, on: Sitting) -> dict[str, Tensor]:
        return {_A: on[_MIXER] @ on["lora_A"], _B: on["lora_B"]}

    def exact(self, on: Sitting) -> dict[str, Tensor]:
        return {_UNMIXED: on["lora_A"], _MIXER: on[_MIXER]}

    def restore(self, on: Sitting, found: Mapping[str, Tensor]) -> None:
        """Where the two are not there apart, what is mixed already is mixed no more."""
        on["lora_B"].copy_(found[_B])
        on["lora_A"].copy_(found.get(_UNMIXED, found[_A]))
        on[_MIXER].copy_(found[_MIXER] if _MIXER in found else torch.eye(self.rank))


def make_mixed(keys: AdapterKeys) -> Mixed:
    """MoSLoRA as a configuration asks for it."""
    return Mixed(rank=keys.lora_rank, alpha=alpha_of(keys), rslora=keys.rslora, dropout=keys.lora_dropout)
