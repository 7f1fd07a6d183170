"""DoRA (Liu et al. 2024): the length of each row of W apart from its direction, which LoRA changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from oarsmith.adapters.change import Sitting, Size, Weight
from oarsmith.adapters.lora import LORA_KEYS, Lora, alpha_of, check_lora, read_rank
from oarsmith.adapters.peft_config import PeftConfig
from oarsmith.config.adapters import AdapterKeys

MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True, kw_only=True)
class Dora(Lora):
    """m / ||V|| * V for each row of V = W + scale B A, with trained lengths m [O]; the bias is not scaled.

    ||V|| follows V but has no gradient (section 4.3 of the paper). In training, dropout strikes the input of B A alone;
    PEFT computes with the dropped input what the new lengths change of W x too.
    """

    keys: ClassVar[Mapping[str, str]] = {**LORA_KEYS, MAGNITUDE: MAGNITUDE}
    adds: ClassVar[bool] = False
    scales_output: ClassVar[bool] = True

    def shapes(self, size: Size) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(size), MAGNITUDE: (size.out_features,)}

    def reset(self, on: Sitting, generator: torch.Generator, weight: Weight) -> None:
        super().reset(on, generator, weight)
        on[MAGNITUDE].copy_(self._lengths(on, weight()))

    def after(self, on: Sitting, y_TO: Tensor, bias_O: Tensor | None, weight: Weight) -> Tensor:
        straight_TO = y_TO if bias_O is None else y_TO - bias_O
        # Added to y, so that lengths that are still W's change nothing, and small changes survive 16 bits.
        return y_TO + (self._gains(on, weight()) - 1).to(y_TO.dtype) * straight_TO

    def merged(self, on: Sitting, weight_OI: Tensor) -> Tensor:
        return self._gains(on, weight_OI)[:, None] * super().merged(on, weight_OI)

    def peft_config(self) -> dict[str, Any]:
        return {**super().peft_config(), "use_dora": True}

    def _gains(self, on: Sitting, weight_OI: Tensor) -> Tensor:
        """m / ||V|| [O]; a row of zeros has no direction to scale."""
        lengths_O = self._lengths(on, weight_OI)
        return torch.where(lengths_O > 0, on[MAGNITUDE] / lengths_O, 1.0)

    @torch.no_grad()
    def _lengths(self, on: Sitting, weight_OI: Tensor) -> Tensor:
        """||V|| [O] from products with r columns, without V: ||w + b A||^2 = ||w||^2 + 2 w A^T b^T + b A A^T b^T."""
        a_rI, b_Or = self.factors(on)
        with_w_O = ((weight_OI @ a_rI.t()) * b_Or).sum(1)
        alone_O = ((b_Or @ (a_rI @ a_rI.t())) * b_Or).sum(1)
        return (weight_OI.square().sum(1) + 2 * with_w_O + alone_O).clamp_min(0).sqrt()


def make_dora(keys: AdapterKeys) -> Dora:
    """DoRA as a configuration asks for it."""
    return Dora(rank=keys.lora_rank, alpha=alpha_of(keys), rslora=keys.rslora, dropout=keys.lora_dropout)


def read_dora(config: PeftConfig, module: str, shapes: Mapping[str, tuple[int, ...]]) -> Dora:
    """DoRA on a projection, from PEFT's file."""
    check_lora(config)
    return Dora(
        rank=read_rank(config, module, shapes),
        alpha=config.for_module("lora_alpha", "alpha_pattern", module, 8.0),  # PEFT's default
        rslora=config.flag("use_rslora"),
        dropout=config.share("lora_dropout"),
    )
