"""Biases that train: alone (BitFit, Ben Zaken et al. 2022), or beside changes of projections as PEFT's ``bias`` asks.

They train in place and in the base's dtype, as where whole models train; what they were before is kept, so that the
base is still there (``enable``). PEFT has no files for BitFit: ours are a config of type BITFIT and the biases, under
the names that PEFT gives them beside LoRA with ``bias`` all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from oarsmith.adapters.part import AdapterPart
from oarsmith.adapters.peft_config import PeftConfig
from oarsmith.adapters.targets import match_targets, target_places
from oarsmith.config.adapters import AdapterKeys
from oarsmith.errors import CheckpointError, ConfigError
from oarsmith.models import families
from oarsmith.models.families import Family
from oarsmith.models.names import Place
from oarsmith.models.spec import DecoderSpec

if TYPE_CHECKING:
    from oarsmith.models.decoder import Decoder

_PREFIX = "base_model.model."
_BASE_LAYER = "base_layer.bias"


@dataclass(frozen=True, kw_only=True)
class BiasesSpec:
    """Biases that train.

    Args:
        names: what an adapter's file calls each -> what the base's files call it.
        beside: PEFT's word for which they are, beside changes of projections; None: alone.
    """

    names: tuple[tuple[str, str], ...]
    beside: str | None = None

    what: ClassVar[str] = "trained biases"
    num_virtual: ClassVar[int] = 0
    prefixes: ClassVar[bool] = True

    def build(self, spec: DecoderSpec) -> Biases:
        return Biases(self)


class Biases(AdapterPart):
    """Has no parameters of its own."""

    what = BiasesSpec.what

    def __init__(self, spec: BiasesSpec) -> None:
        super().__init__()
        self.spec = spec
        # For each parameter the other value: the base's while the part is on, the trained one while it is off.
        self._others: list[tuple[nn.Parameter, Tensor]] = []

    def reset(self, model: Decoder, generator: torch.Generator) -> None:
        """Begin with the base's own."""
        parameters, views = dict(model.named_parameters()), self._places(model)
        chosen: dict[str, list[Place]] = {}
        for place in views.values():
            chosen.setdefault(place.parameter, []).append(place)
        self._others = []
        for name, places in chosen.items():
            parameter = parameters[name]
            parameter.requires_grad_(True)
            self._others.append((parameter, parameter.detach().clone()))
            mask = torch.zeros_like(parameter)
            for place in places:
                place.view(mask).fill_(1)
            if not bool(mask.all()):
                # Of a fused map's biases only those of the chosen projections train.
                parameter.register_hook(partial(torch.mul, mask))

    def _places(self, model: Decoder) -> dict[str, Place]:
        """By their names in an adapter's file."""
        places = {place.file: place for place in families.find(model.config).names(model.spec).places}
        return {key: places[file] for key, file in self.spec.names}

    def enable(self, on: bool) -> None:
        if on != self.enabled:
            others = []
            for parameter, other in self._others:
                others.append((parameter, parameter.data))
                parameter.data = other
            self._others = others
        super().enable(on)

    def stored(self, model: Decoder) -> Mapping[str, Tensor]:
        parameters = dict(model.named_parameters())
        return {key: place.view(parameters[place.parameter].data) for key, place in self._places(model).items()}

    def restore(self, model: Decoder, found: Mapping[str, Tensor]) -> None:
        for key, tensor in self.stored(model).items():
            tensor.copy_(found[key])

    def peft_config(self, model: Decoder) -> dict[str, Any]:
        return {"peft_type": "BITFIT"} if self.spec.beside is None else {"bias": self.spec.beside}

    def merge(self, model: Decoder) -> None:
        """They are merged already."""


def make_biases(keys: AdapterKeys, base: Path, family: Family, spec: DecoderSpec) -> BiasesSpec:
    """The biases that a configuration asks for."""
    places = [place for place in family.names(spec).places if _is_bias(place)]
    if keys.adapter_type == "bitfit":
        _require(places, "train lora instead")
        return BiasesSpec(names=tuple((f"{_PREFIX}{place.file}", place.file) for place in places))
    projections = target_places(family.names(spec))
    adapted = set(match_targets(projections, keys.lora_target_modules or "all-linear"))
    if keys.lora_bias == "lora_only":
        places = [place for place in places if _module(place) in adapted]
    _require(places, "set lora_bias to none")
    names = ((_beside(place, _module(place) in adapted), place.file) for place in places)
    return BiasesSpec(names=tuple(names), beside=keys.lora_bias)


def _require(places: list[Place], fix: str) -> None:
    if not places:
        raise ConfigError("this model has no biases that could train", where="adapter_type", fix=fix)


def _is_bias(place: Place) -> bool:
    return place.file.endswith(".bias")


def _module(place: Place) -> str:
    return place.file.removesuffix(".bias")


def _beside(place: Place, adapted: bool) -> str:
    """PEFT's name: those of adapted projections lie in the layer that it wraps."""
    return f"{_PREFIX}{_module(place)}.{_BASE_LAYER}" if adapted else f"{_PREFIX}{place.file}"


def biases_in(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The names of a file's tensors that are biases of the base."""
    return [name for name in shapes if name.endswith(".bias") and name.startswith(_PREFIX) and ".lora_" not in name]


def read_biases(
    config: PeftConfig, shapes: Mapping[str, tuple[int, ...]], family: Family, spec: DecoderSpec
) -> BiasesSpec:
    """Biases from a file, alone or beside changes of projections; older files of PEFT have no ``base_layer``."""
    files, names = {place.file for place in family.names(spec).places if _is_bias(place)}, []
    for key in biases_in(shapes):
        file = key.removeprefix(_PREFIX).removesuffix(_BASE_LAYER).removesuffix("bias") + "bias"
        if file not in files:
            raise CheckpointError(f"tensor {key} has no place in this model", where=config.where)
        names.append((key, file))
    alone = config.peft_type == "BITFIT"
    if not names:
        raise CheckpointError("there are no biases in the file", where=config.where)
    return BiasesSpec(names=tuple(names), beside=None if alone else str(config.values.get("bias") or "all"))
