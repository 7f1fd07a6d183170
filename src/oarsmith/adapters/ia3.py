"""IA3: a vector that scales what a projection gives or is given (Liu et al. 2022).

As in the paper, keys and values are scaled where they come out, and the hidden activations of the feed-forward part
where they go into its last projection; PEFT's tables for some families have queries in place of keys. A projection
that makes queries, keys and values at once is scaled as a whole. Other projections can be named, and those of them that
scale their input (``ia3_feedforward_modules``).

Shapes: T tokens, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from oarsmith.adapters.change import Change, Sitting, Size, Weight
from oarsmith.adapters.peft_config import PeftConfig
from oarsmith.adapters.roles import by_role, ends_feed_forward, makes_keys_or_values
from oarsmith.adapters.targets import match_targets
from oarsmith.config.adapters import AdapterKeys
from oarsmith.errors import CheckpointError
from oarsmith.models.names import Place


@dataclass(frozen=True, kw_only=True)
class Ia3(Change):
    """A vector of ones at first."""

    keys: ClassVar[Mapping[str, str]] = {"ia3_l": "ia3_l"}

    def reset(self, on: Sitting, generator: torch.Generator, weight: Weight) -> None:
        on["ia3_l"].fill_(1.0)

    def peft_config(self) -> dict[str, Any]:
        return {"peft_type": "IA3"}

    @classmethod
    def peft_configs(cls, changes: Mapping[str, Change]) -> dict[str, Any]:
        """Whole names, of which the one list is part of the other as PEFT asks for."""
        inputs = [name for name, change in changes.items() if isinstance(change, ScaledInput)]
        return {"peft_type": "IA3", "target_modules": list(changes), "feedforward_modules": inputs}


@dataclass(frozen=True, kw_only=True)
class ScaledInput(Ia3):
    """W (l * x) + b."""

    turns_input: ClassVar[bool] = True

    def shapes(self, size: Size) -> dict[str, tuple[int, ...]]:
        return {"ia3_l": (1, size.in_features)}

    def before(self, on: Sitting, x_TI: Tensor) -> Tensor:
        return (x_TI * on["ia3_l"].flatten()).to(x_TI.dtype)

    def merged(self, on: Sitting, weight_OI: Tensor) -> Tensor:
        return weight_OI * on["ia3_l"]


@dataclass(frozen=True, kw_only=True)
class ScaledOutput(Ia3):
    """l * (W x + b)."""

    scales_output: ClassVar[bool] = True

    def shapes(self, size: Size) -> dict[str, tuple[int, ...]]:
        return {"ia3_l": (size.out_features, 1)}

    def after(self, on: Sitting, y_TO: Tensor, bias_O: Tensor | None, weight: Weight) -> Tensor:
        return (y_TO * on["ia3_l"].flatten()).to(y_TO.dtype)

    def merged(self, on: Sitting, weight_OI: Tensor) -> Tensor:
        return weight_OI * on["ia3_l"]

    def merged_bias(self, on: Sitting, bias_O: Tensor | None) -> Tensor | None:
        return None if bias_O is None else bias_O * on["ia3_l"].flatten()


def choose_ia3(keys: AdapterKeys, places: Mapping[str, Place]) -> dict[str, Change]:
    """IA3 as a configuration asks for it, on each projection."""
    if keys.lora_target_modules is None:
        chosen = by_role(places, (makes_keys_or_values, ends_feed_forward))
    else:
        chosen = match_targets(places, keys.lora_target_modules)
    if keys.ia3_feedforward_modules is None:
        inputs = {module for module in chosen if ends_feed_forward(places[module])}
    else:
        own = {module: places[module] for module in chosen}
        inputs = set(match_targets(own, keys.ia3_feedforward_modules, where="ia3_feedforward_modules"))
    return {module: ScaledInput() if module in inputs else ScaledOutput() for module in chosen}


def read_ia3(config: PeftConfig, module: str, shapes: Mapping[str, tuple[int, ...]]) -> Ia3:
    """IA3 on a projection, from PEFT's file: the vector lies the way it is used."""
    config.refuse("modules_to_save")
    shape = shapes["ia3_l"]
    if len(shape) != 2 or 1 not in shape:
        raise CheckpointError(f"{module} has an ia3_l of shape {shape}, not [1, in] or [out, 1]", where=config.where)
    return ScaledInput() if shape[0] == 1 else ScaledOutput()
