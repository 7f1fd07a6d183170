"""Stretching a model's context: its ``config.json`` with a rule for rotary positions beyond the trained length.

The rule is written where every reader of the file finds it, so that what is trained with it is what is served.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any

from oarsmith.errors import ModelError
from oarsmith.models import families
from oarsmith.models.families.base import Family, StretchKind
from oarsmith.models.spec import DecoderSpec
from oarsmith.models.spec_parts import GQA, AttentionSpec
from oarsmith.models.spec_position import (
    Alibi,
    DynamicScaling,
    LinearScaling,
    Rope,
    RopeScaling,
    SteppedScaling,
    TwoRowRope,
    YarnScaling,
)


def stretch(config: Mapping[str, Any], kind: StretchKind, factor: float) -> dict[str, Any]:
    """A copy of ``config.json`` whose context is ``factor`` times as long.

    ===========  ====================================================================  =======================
    kind         what happens                                                          what is written
    ===========  ====================================================================  =======================
    ``linear``   positions / factor (Chen et al. 2023)                                 the rule
    ``ntk``      base * factor^(d / (d - 2)), d turned entries of a head (bloc97)      base, length
    ``dynamic``  the same growth with the document, once it is longer than trained     the rule
    ``yarn``     by parts; cos and sin * (0.1 ln factor + 1) (Peng et al. 2023)        rule, both lengths
    ===========  ====================================================================  =======================

    With ``linear`` and ``dynamic`` the stated length stays the trained one: transformers' dynamic rule starts there,
    and servers multiply it by the factor. A factor of 1, or the rule the config has already, changes nothing.

    Raises:
        ModelError: the model has no rotary positions, is stretched in another way, or comes with code that does not
            follow such a rule.
    """
    if not 1 <= factor < float("inf"):
        raise ModelError(f"a context cannot become {factor} times as long", where=_KEY, fix="give a factor above 1")
    result = copy.deepcopy(dict(config))
    if factor == 1:
        return result
    family, spec = families.build_spec(config)
    rope = _rope(family, spec)
    if rope.scaling is not None and not isinstance(rope.scaling, SteppedScaling):
        if _is(rope.scaling, kind, factor):
            return result
        raise ModelError(
            f"the model's context is already stretched: {rope.scaling}",
            where="config.json: rope_scaling",
            fix=f"set {_KIND} to none, or start from the model before it was stretched",
        )
    if kind not in family.stretching.kinds:
        known = ", ".join(family.stretching.kinds)
        raise ModelError(
            f"{family.name} models cannot be stretched by the rule {kind}: {family.stretching.reason}",
            where=_KIND,
            fix=f"use {known}" if known else "use a model of another family",
        )
    if kind in ("ntk", "dynamic") and rope.dim <= 2:
        raise ModelError(
            f"{kind} spreads a growth over the frequencies, but {rope.dim} turned entries of a head have only one",
            where=_KIND,
            fix="use linear or yarn",
        )
    _write(result, family, spec, rope, kind, factor)
    return result


_KIND, _KEY = "rope_scaling_type", "rope_scaling_factor"


def _rope(family: Family, spec: DecoderSpec) -> Rope:
    """The rotation to be stretched: of the layers that see whole documents, where sliding ones have another."""
    if spec.embedding.positions is not None:
        raise ModelError(
            f"{family.name} models learn a vector for each of {spec.embedding.positions.size} positions: there is no"
            " rotation to stretch",
            where=_KIND,
            fix="use a model with rotary positions",
        )
    mixers = [layer.attention for layer in spec.layers]
    positions = {mixer.position for mixer in mixers if mixer.position is not None}
    if len(positions) > 1:
        positions = {mixer.position for mixer in mixers if mixer.position is not None and _window(mixer) is None}
    assert len(positions) == 1, positions
    (position,) = positions
    if isinstance(position, Alibi):
        raise ModelError(
            "the model has ALiBi's penalties instead of rotary positions: they hold at any length",
            where=_KIND,
            fix=f"set {_KIND} to none and train on longer documents",
        )
    return position.rope if isinstance(position, TwoRowRope) else position


def _window(attention: AttentionSpec) -> int | None:
    return attention.window if isinstance(attention, GQA) else None


def _is(scaling: RopeScaling, kind: StretchKind, factor: float) -> bool:
    match scaling:
        case LinearScaling(factor=own):
            return kind == "linear" and own == factor
        case DynamicScaling(factor=own):
            return kind == "dynamic" and own == factor
        case YarnScaling(factor=own):
            return kind == "yarn" and own == factor
        case _:
            return False


def _write(
    result: dict[str, Any], family: Family, spec: DecoderSpec, rope: Rope, kind: StretchKind, factor: float
) -> None:
    rule, trained = family.stretching, spec.max_positions
    holder, type_key = _holder(result)
    if kind == "ntk":
        base = rope.theta * factor ** (rope.dim / (rope.dim - 2))
        if holder is not None and holder.get("rope_theta") is not None:
            holder["rope_theta"] = base
        else:
            result[rule.base] = base / rule.base_unit
    else:
        if holder is None:
            holder = result["rope_scaling"] = {}
        holder.pop("rope_type", None), holder.pop("type", None)
        holder.update({type_key: kind, "factor": float(factor)})
        if kind == "yarn":
            holder["original_max_position_embeddings"] = trained
    stated = [key for key in rule.lengths if result.get(key) is not None]
    if not stated:
        stated = [rule.lengths[0]]
        result[stated[0]] = trained
    if kind in rule.grow_with:
        for key in stated:
            result[key] = int(result[key] * factor)


def _holder(config: dict[str, Any]) -> tuple[MutableMapping[str, Any] | None, str]:
    """The object of rope values, and what it calls the rule: transformers 5's ``rope_parameters``, or the older one.

    ``type`` is the word of the older one that all versions of transformers, and the code that came with models, read.
    """
    if config.get("rope_scaling"):
        return config["rope_scaling"], "type"
    stated = config.get("rope_parameters")
    if not stated:
        return None, "type"
    return stated.get("full_attention", stated), "rope_type"
