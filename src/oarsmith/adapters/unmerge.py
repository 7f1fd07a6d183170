"""Undoing a merge in memory: what it replaced is kept, so the base's weights come back bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from oarsmith.adapters.linear import adapted_modules
from oarsmith.errors import ConfigError
from oarsmith.models.decoder import Decoder
from oarsmith.models.spec import DecoderSpec


@dataclass(frozen=True)
class Replaced:
    """What a merge changes in a decoder, as it was before.

    Attributes:
        modules: the adapted maps by their paths.
        values: copies of all weights that may change, beside their parameters.
    """

    modules: Mapping[str, nn.Module]
    parts: nn.ModuleList
    spec: DecoderSpec
    config: Mapping[str, Any]
    head: nn.Parameter | None
    values: tuple[tuple[nn.Parameter, Tensor], ...]


# Beside the decoders, which know of no adapters.
_REPLACED: WeakKeyDictionary[Decoder, Replaced] = WeakKeyDictionary()


def replaced_by_merge(model: Decoder) -> Replaced:
    """To be taken before a merge."""
    modules = dict(adapted_modules(model))
    weights = [parameter for module in modules.values() for parameter in (module.weight, module.bias)]
    if len(model.parts):
        weights += [model.embedding.weight, model.head.weight]
    values = tuple((weight, weight.detach().clone()) for weight in weights if weight is not None)
    return Replaced(modules, model.parts, model.spec, dict(model.config), model.head.weight, values)


def keep_replaced(model: Decoder, replaced: Replaced) -> None:
    """For :func:`unmerge_adapter`."""
    _REPLACED[model] = replaced


@torch.no_grad()
def unmerge_adapter(model: Decoder) -> Decoder:
    """Undo :func:`oarsmith.merge_adapter`: the model has its adapter beside the base again.

    Works in place and gives the same object. Weights are what they were before the merge, bit for bit (in the dtype
    that the model has by now); what was done to merged weights in the meantime is lost.

    Raises:
        ConfigError: nothing is merged into this model, or what the merge replaced was not kept.
    """
    replaced = _REPLACED.pop(model, None)
    if replaced is None:
        raise ConfigError(
            "nothing is merged into this model that could be undone",
            where="adapter",
            fix="merge_adapter(model) keeps what it replaces; files: oarsmith merge-adapter --unmerge",
        )
    for path, module in replaced.modules.items():
        model.set_submodule(path, module)
    model.parts, model.spec, model.config = replaced.parts, replaced.spec, dict(replaced.config)
    model.head.weight, model.head.spec = replaced.head, replaced.spec.head
    for weight, value in replaced.values:
        weight.copy_(value)
    return model
