"""Bottleneck adapters: a narrow network with a nonlinearity beside the frozen one.

``houlsby`` (Houlsby et al. 2019): after the attention's output projection and after the feed-forward part's, what they
give goes through down, an activation and up, and is added to itself, before the residual connection. ``pfeiffer``
(Pfeiffer et al. 2021): after the feed-forward part only. ``parallel`` (He et al. 2022): the network has the input of
the projection instead, and a scale; by itself it sits where pfeiffer's does. (He et al.'s spans a whole sub-layer, ours
a projection; any projections can be named.)

Up is zero at first, where Houlsby et al. have small random numbers, so that training begins at the base model. A
nonlinearity cannot be folded into a projection.

Shapes: T tokens, I in features, O out features, r width of the bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.adapters.change import Change, Sitting, Size, Weight
from oarsmith.adapters.peft_config import PeftConfig
from oarsmith.adapters.roles import by_role, ends_attention, ends_feed_forward
from oarsmith.adapters.targets import match_targets
from oarsmith.config.adapters import AdapterKeys
from oarsmith.errors import CheckpointError, ConfigError
from oarsmith.models.names import Place

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}
_NAMES = ("bottleneck_down", "bottleneck_down_bias", "bottleneck_up", "bottleneck_up_bias")
_ROLES = {"houlsby": (ends_attention, ends_feed_forward)}


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Change):
    """scale * (up f(down z + c) + d) of what it is given, z."""

    keys: ClassVar[Mapping[str, str]] = {name: name for name in _NAMES}
    mergeable: ClassVar[bool] = False

    width: int
    activation: str = "gelu"
    scale: float = 1.0

    def given(self, size: Size) -> int:
        """Features of z."""
        raise NotImplementedError

    def shapes(self, size: Size) -> dict[str, tuple[int, ...]]:
        columns, rows = self.given(size), size.out_features
        return dict(zip(_NAMES, ((self.width, columns), (self.width,), (rows, self.width), (rows,)), strict=True))

    def reset(self, on: Sitting, generator: torch.Generator, weight: Weight) -> None:
        down = on["bottleneck_down"]
        bound = 1 / math.sqrt(down.shape[1])
        down.copy_(torch.empty(down.shape).uniform_(-bound, bound, generator=generator))
        for name in _NAMES[1:]:
            on[name].zero_()

    def _through(self, on: Sitting, z_TZ: Tensor) -> Tensor:
        down_rZ, low_r, up_Or, high_O = (on[name].to(z_TZ.dtype) for name in _NAMES)
        inner_Tr = _ACTIVATIONS[self.activation](functional.linear(z_TZ, down_rZ, low_r))
        return functional.linear(inner_Tr, up_Or, high_O) * self.scale

    def merged(self, on: Sitting, weight_OI: Tensor) -> Tensor:
        raise ConfigError(
            "a bottleneck adapter has a nonlinearity and cannot be merged into its base",
            where="adapter_type",
            fix="load it with the model (--adapter)",
        )

    def peft_config(self) -> dict[str, Any]:
        return {
            "peft_type": "BOTTLENECK",
            "r": self.width,
            "activation": self.activation,
            "scale": self.scale,
            "parallel": isinstance(self, Parallel),
        }


@dataclass(frozen=True, kw_only=True)
class Serial(Bottleneck):
    """z is what the projection gives."""

    scales_output: ClassVar[bool] = True

    def given(self, size: Size) -> int:
        return size.out_features

    def after(self, on: Sitting, y_TO: Tensor, bias_O: Tensor | None, weight: Weight) -> Tensor:
        return y_TO + self._through(on, y_TO)


@dataclass(frozen=True, kw_only=True)
class Parallel(Bottleneck):
    """z is what the projection is given."""

    def given(self, size: Size) -> int:
        return size.in_features

    def added(self, on: Sitting, x_TI: Tensor, *, training: bool) -> Tensor:
        return self._through(on, x_TI)


def choose_bottleneck(keys: AdapterKeys, places: Mapping[str, Place]) -> dict[str, Change]:
    """Bottlenecks as a configuration asks for them, on each projection."""
    placement = keys.bottleneck_placement
    kind = Parallel if placement == "parallel" else Serial
    change = kind(width=keys.lora_rank, activation=keys.bottleneck_activation, scale=keys.bottleneck_scale)
    if keys.lora_target_modules is not None:
        return dict.fromkeys(match_targets(places, keys.lora_target_modules), change)
    return dict.fromkeys(by_role(places, _ROLES.get(placement, (ends_feed_forward,))), change)


def read_bottleneck(config: PeftConfig, module: str, shapes: Mapping[str, tuple[int, ...]]) -> Bottleneck:
    """A bottleneck on a projection, from a file."""
    config.refuse("modules_to_save")
    activation = config.values.get("activation")
    if activation not in _ACTIVATIONS:
        raise CheckpointError(f"{activation!r} is no activation", where=f"{config.where}: activation")
    kind = Parallel if config.flag("parallel") else Serial
    return kind(width=config.whole("r", 8), activation=activation, scale=config.number("scale", 1.0))
