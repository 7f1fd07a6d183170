"""Quantized weights as a decoder's fused and stacked maps hold them: codes moved, not changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from oarsmith.checkpoint.tensors import TensorSource
from oarsmith.kernels.coded import CodedWeight
from oarsmith.models.names import ExpertRows, Place, Rows, whole

Parts = list[tuple[int, CodedWeight]]
"""The parts of a weight, each with the row that it begins at."""


def stored_parts(places: Sequence[Place], file_names: Mapping[str, str], source: TensorSource) -> list[Parts] | None:
    """What the files hold of a parameter's weight, or of each expert's in their order.

    None: a tensor is stored in floats, in another order, or transposed.
    """
    experts: dict[int, Parts] = {}
    for place in places:
        where = _rows(place)
        found = None if where is None else source.coded(file_names[place.file])
        if where is None or found is None:
            return None
        experts.setdefault(where[0], []).append((where[1], found))
    return [experts[expert] for expert in sorted(experts)]


def stored_codes(
    places: Sequence[Place], file_names: Mapping[str, str], source: TensorSource, device: torch.device
) -> list[CodedWeight] | None:
    """The codes of a parameter that these tensors make up, one weight, or one for each expert in their order.

    None: a tensor is stored in floats or in another code than the rest, or transposed.
    """
    experts = stored_parts(places, file_names, source)
    if experts is None or len({_kind(weight) for parts in experts for _, weight in parts}) > 1:
        return None
    return [_joined(parts, device) for parts in experts]


def _rows(place: Place) -> tuple[int, int] | None:
    """Expert and first row of a tensor in its parameter."""
    match place.view:
        case Rows(start=start):
            return 0, start
        case ExpertRows(expert=expert, start=start):
            return expert, start
        case view if view is whole and place.shape is None:
            return 0, 0
    return None


def _kind(weight: CodedWeight) -> tuple[object, ...]:
    zeros = weight.zero_OG is not None
    return weight.code, weight.group, weight.in_features, weight.scale_OG.dtype, weight.scale_OG.shape[1], zeros


def _joined(parts: Sequence[tuple[int, CodedWeight]], device: torch.device) -> CodedWeight:
    weights = [weight for _, weight in sorted(parts, key=lambda part: part[0])]

    def rows(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors)).to(device) if len(tensors) > 1 else tensors[0].to(device)

    zeros = [weight.zero_OG for weight in weights if weight.zero_OG is not None]
    return replace(
        weights[0],
        codes_OB=rows([weight.codes_OB for weight in weights]),
        scale_OG=rows([weight.scale_OG for weight in weights]),
        zero_OG=rows(zeros) if zeros else None,
    )
