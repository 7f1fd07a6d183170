"""Changes that have every hook of the contract, for tests of what goes through the hooks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from oarsmith.adapters.change import Change, Delta, Sitting, Size, Weight
from oarsmith.adapters.lora import Lora
from oarsmith.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Made(Change):
    """The input is scaled, a product of vectors is added, and what W gives gets rows of a length of its own."""

    keys: ClassVar[Mapping[str, str]] = {
        "turn": "made_turn",
        "up": "made_up.weight",
        "down": "made_down.weight",
        "length": "made_length",
        "share": "made_share",
    }
    frozen: ClassVar[frozenset[str]] = frozenset({"turn"})
    turns_input: ClassVar[bool] = True
    scales_output: ClassVar[bool] = True
    peft_type: ClassVar[str] = "MADE"

    factor: float

    def shapes(self, size: Size) -> dict[str, tuple[int, ...]]:
        rows, columns = (size.out_features,), (size.in_features,)
        return {"turn": columns, "up": rows, "down": columns, "length": rows, "share": rows}

    def reset(self, on: Sitting, generator: torch.Generator, weight: Weight) -> None:
        for name in ("turn", "share"):
            on[name].fill_(1.0)
        on["up"].zero_()
        on["down"].copy_(torch.randn(on["down"].shape, generator=generator))
        on["length"].copy_(weight().norm(dim=1))

    def before(self, on: Sitting, x_TI: Tensor) -> Tensor:
        return x_TI * on["turn"].to(x_TI.dtype)

    def added(self, on: Sitting, x_TI: Tensor, *, training: bool) -> Tensor:
        up, down = on["up"].to(x_TI.dtype), on["down"].to(x_TI.dtype)
        return self.factor * (x_TI @ down)[..., None] * up

    def after(self, on: Sitting, y_TO: Tensor, bias_O: Tensor | None, weight: Weight) -> Tensor:
        bias_O = torch.zeros_like(on["share"]) if bias_O is None else bias_O
        gain = (on["length"] / weight().norm(dim=1)).to(y_TO.dtype)
        return ((y_TO - bias_O) * gain + bias_O) * on["share"].to(y_TO.dtype)

    def merged(self, on: Sitting, weight_OI: Tensor) -> Tensor:
        gain = on["share"] * on["length"] / weight_OI.norm(dim=1)
        return gain[:, None] * (weight_OI + self.factor * torch.outer(on["up"], on["down"])) * on["turn"]

    def merged_bias(self, on: Sitting, bias_O: Tensor | None) -> Tensor | None:
        return None if bias_O is None else bias_O * on["share"]

    def stored(self, on: Sitting) -> dict[str, Tensor]:
        return {**super().stored(on), "made_turn": on["turn"][None]}

    def restore(self, on: Sitting, found: Mapping[str, Tensor]) -> None:
        super().restore(on, {**found, "made_turn": found["made_turn"][0]})

    def peft_config(self) -> dict[str, Any]:
        return {"peft_type": self.peft_type, "factor": self.factor}


@dataclass(frozen=True, kw_only=True)
class After(Made):
    """Its input is that of the base: W is applied once for all segments."""

    turns_input: ClassVar[bool] = False

    def before(self, on: Sitting, x_TI: Tensor) -> Tensor:
        return x_TI

    def merged(self, on: Sitting, weight_OI: Tensor) -> Tensor:
        return super().merged(on, weight_OI) / on["turn"]


@dataclass(frozen=True, kw_only=True)
class Alone(Made):
    """No plain map does the same."""

    mergeable: ClassVar[bool] = False
    peft_type: ClassVar[str] = "ALONE"

    def merged(self, on: Sitting, weight_OI: Tensor) -> Tensor:
        raise ConfigError("cannot be merged")


@dataclass(frozen=True, kw_only=True)
class Whole(Delta):
    """Any change of W."""

    keys: ClassVar[Mapping[str, str]] = {"delta": "delta"}

    def shapes(self, size: Size) -> dict[str, tuple[int, ...]]:
        return {"delta": (size.out_features, size.in_features)}

    def reset(self, on: Sitting, generator: torch.Generator, weight: Weight) -> None:
        on["delta"].zero_()

    def delta(self, on: Sitting) -> Tensor:
        return on["delta"]


MADE, AFTER, WHOLE, LORA = Made(factor=0.5), After(factor=-1.5), Whole(), Lora(rank=2, alpha=1.0)
