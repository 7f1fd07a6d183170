"""Which projections an adapter sits on: names in the family's own spelling, matched as PEFT matches them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from oarsmith.adapters.lora import Lora, LoraSegment
from oarsmith.checkpoint.hf import projection_places
from oarsmith.errors import ConfigError
from oarsmith.models.families import Family
from oarsmith.models.names import Place
from oarsmith.models.spec import DecoderSpec, rewrite_linears
from oarsmith.models.spec_parts import LinearSpec


def match_targets(modules: Iterable[str], targets: str | tuple[str, ...]) -> list[str]:
    """The module names that ``targets`` selects.

    ``"all-linear"`` selects every projection of the blocks (never the head); a single word is a name; any other string
    is a regular expression for the whole name; a tuple holds names matched at a dot from the end (``q_proj``,
    ``0.self_attn.q_proj``).

    Raises:
        ConfigError: an entry that selects nothing; lists what there is.
    """
    names = list(modules)
    if targets == "all-linear":
        return names
    if isinstance(targets, str) and targets.isidentifier():
        targets = (targets,)
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ConfigError(f"not a regular expression: {error}", where="lora_target_modules") from error
        chosen = {targets: [name for name in names if pattern.fullmatch(name)]}
    else:
        chosen = {key: [name for name in names if name == key or name.endswith(f".{key}")] for key in targets}
    empty = [key for key, found in chosen.items() if not found]
    if empty or not chosen:
        leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
        raise ConfigError(
            f"{', '.join(empty) or 'an empty list'} selects no projection of this model",
            where="lora_target_modules",
            fix=f"use all-linear or some of: {', '.join(leaves)}",
        )
    selected = {name for found in chosen.values() for name in found}
    return [name for name in names if name in selected]


def lora_rewrite(
    choose: Callable[[list[str]], Mapping[str, LoraSegment]], dropout: float
) -> Callable[[Family, DecoderSpec], DecoderSpec]:
    """A spec rewrite that puts LoRA on projections.

    Args:
        choose: from the family's module names to the adapter of each chosen one (its ``name`` is filled in here).
    """

    def rewrite(family: Family, spec: DecoderSpec) -> DecoderSpec:
        places = projection_places(family.names(spec))
        chosen = {module: replace(adapter, name="") for module, adapter in choose(list(places)).items()}
        _check_experts(chosen, places)
        segments: dict[str, dict[str, LoraSegment]] = {}
        for module, adapter in chosen.items():
            place = places[module]
            assert place.segment is not None
            path = place.parameter.removesuffix(".weight")
            segments.setdefault(path, {})[place.segment] = replace(adapter, name=place.segment)

        def rule(path: str, linear: LinearSpec) -> LinearSpec:
            if path not in segments:
                return linear
            return replace(linear, rewrite=Lora(segments=tuple(segments[path].values()), dropout=dropout))

        return rewrite_linears(spec, rule)

    return rewrite


def _check_experts(chosen: Mapping[str, LoraSegment], places: Mapping[str, Place]) -> None:
    """Experts lie stacked, so those of a layer have an adapter each, of the same rank and scale, or none has.

    Raises:
        ConfigError: some of them only; names the first that differs.
    """
    expected: dict[tuple[str, str | None], tuple[str, LoraSegment | None]] = {}
    for module, place in places.items():
        if place.expert is not None:
            first, adapter = expected.setdefault((place.parameter, place.segment), (module, chosen.get(module)))
            if chosen.get(module) != adapter:
                raise ConfigError(
                    f"{first} and {module} do not have the same adapter: the experts of a layer are adapted together",
                    where="lora_target_modules",
                    fix="name the projection of all experts (gate_proj), with one rank and one alpha",
                )
