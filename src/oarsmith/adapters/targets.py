"""Which projections an adapter sits on: names in the family's own spelling, matched as PEFT matches them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from oarsmith.adapters.change import Change, Size
from oarsmith.adapters.ends import EMBEDDING, HEAD, EndsSpec, as_end, end_linear, end_of, end_places
from oarsmith.adapters.forms import WeightForm
from oarsmith.adapters.linear import Adapt, Fake
from oarsmith.checkpoint.hf import projection_places
from oarsmith.errors import ConfigError
from oarsmith.models.families import Family
from oarsmith.models.names import NameMap, Place
from oarsmith.models.spec import DecoderSpec, linear_specs, rewrite_linears
from oarsmith.models.spec_parts import LinearSpec

# Names of the ends that are understood in every family, whatever it calls them itself.
_ALIASES = {"embed_tokens": EMBEDDING, "lm_head": HEAD}


def target_places(names: NameMap) -> dict[str, Place]:
    """What an adapter can sit on, by its name in the family's own spelling: the projections, and the two ends."""
    return projection_places(names) | end_places(names)


def match_targets(
    places: Mapping[str, Place], targets: str | tuple[str, ...], *, where: str = "lora_target_modules"
) -> list[str]:
    """The module names that ``targets`` selects.

    ``"all-linear"`` selects every projection of the blocks (never embedding and head); a single word is a name; any
    other string is a regular expression for the whole name; a tuple holds names matched at a dot from the end
    (``q_proj``, ``0.self_attn.q_proj``). ``embed_tokens`` and ``lm_head`` are the ends of any family.

    Raises:
        ConfigError: an entry that selects nothing; lists what there is.
    """
    names = list(places)
    if targets == "all-linear":
        return [name for name in names if end_of(places[name]) is None]
    if isinstance(targets, str) and targets.isidentifier():
        targets = (targets,)
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ConfigError(f"not a regular expression: {error}", where=where) from error
        chosen = {targets: [name for name in names if pattern.fullmatch(name)]}
    else:
        chosen = {key: [name for name in names if name == key or name.endswith(f".{key}")] for key in targets}
        for key in set(_ALIASES) & set(chosen):
            chosen[key] = chosen[key] or [name for name in names if end_of(places[name]) == _ALIASES[key]]
    empty = [key for key, found in chosen.items() if not found]
    if empty or not chosen:
        leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
        raise ConfigError(
            f"{', '.join(empty) or 'an empty list'} selects no projection of this model",
            where=where,
            fix=f"use all-linear or some of: {', '.join(leaves)}",
        )
    selected = {name for found in chosen.values() for name in found}
    return [name for name in names if name in selected]


SpecRewrite = Callable[[Family, DecoderSpec], DecoderSpec]


def adapt_rewrite(choose: Callable[[Mapping[str, Place]], Mapping[str, Change]]) -> SpecRewrite:
    """A spec rewrite that puts changes on projections.

    Args:
        choose: from the family's module names, and where their weights lie, to the change of each chosen one.
    """

    def rewrite(family: Family, spec: DecoderSpec) -> DecoderSpec:
        places = target_places(family.names(spec))
        chosen = _settled(choose(places), places, spec)
        _check_experts(chosen, places)
        changes: dict[str, dict[str, Change]] = {}
        ends: dict[str, tuple[LinearSpec, Change]] = {}
        for module, change in chosen.items():
            place = places[module]
            assert place.segment is not None
            if (end := end_of(place)) is not None:
                ends[end] = end_linear(place, spec), change
                continue
            changes.setdefault(place.parameter.removesuffix(".weight"), {})[place.segment] = change

        def rule(path: str, linear: LinearSpec) -> LinearSpec:
            return replace(linear, rewrite=Adapt(changes=tuple(changes[path].items()))) if path in changes else linear

        made = _ends(spec, ends)
        return replace(rewrite_linears(spec, rule), parts=(*spec.parts, *made))

    return rewrite


def _ends(spec: DecoderSpec, changed: Mapping[str, tuple[LinearSpec, Change]]) -> tuple[EndsSpec, ...]:
    if not changed:
        return ()
    padding = spec.embedding.padding_id
    return (EndsSpec(embedding=changed.get(EMBEDDING), head=changed.get(HEAD), padding_id=padding),)


def _settled(chosen: Mapping[str, Change], places: Mapping[str, Place], spec: DecoderSpec) -> dict[str, Change]:
    """The changes as they are beside each other (`Change.among`)."""
    linears = dict(linear_specs(spec))
    sizes: dict[Change, list[Size]] = {}
    chosen = {
        module: change if end_of(places[module]) is None else as_end(module, places[module], change, spec)
        for module, change in chosen.items()
    }
    for module, change in chosen.items():
        place = places[module]
        path = place.parameter.removesuffix(".weight")
        linear = linears[path] if path in linears else end_linear(place, spec)
        rows = next(segment.size for segment in linear.segments if segment.name == place.segment)
        sizes.setdefault(change, []).append(Size(rows, linear.in_features))
    settled = {change: change.among(found) for change, found in sizes.items()}
    return {module: settled[change] for module, change in chosen.items()}


def kept_as(form: WeightForm, inner: SpecRewrite) -> SpecRewrite:
    """``inner``'s rewrite of a spec, then all linear maps of the layers in a form from the moment they are loaded.

    Embedding, norms and head stay as they are, and so do adapters, whose files do not tell what base they were trained
    on; merging takes the checkpoint's own weights.
    """

    def rule(_: str, linear: LinearSpec) -> LinearSpec:
        adapt = linear.rewrite or Adapt()
        assert isinstance(adapt, Adapt), adapt
        return replace(linear, rewrite=replace(adapt, form=form))

    return lambda family, spec: rewrite_linears(inner(family, spec), rule)


def faked(fake: Fake, inner: SpecRewrite) -> SpecRewrite:
    """``inner``'s rewrite of a spec, then all linear maps of the layers computing what they will be when quantized."""

    def rule(_: str, linear: LinearSpec) -> LinearSpec:
        adapt = linear.rewrite or Adapt()
        assert isinstance(adapt, Adapt), adapt
        return replace(linear, rewrite=replace(adapt, fake=fake))

    return lambda family, spec: rewrite_linears(inner(family, spec), rule)


def _check_experts(chosen: Mapping[str, Change], places: Mapping[str, Place]) -> None:
    """Experts lie stacked, so those of a layer have the same change, or none has any.

    Raises:
        ConfigError: some of them only; names the first that differs.
    """
    expected: dict[tuple[str, str | None], tuple[str, Change | None]] = {}
    for module, place in places.items():
        if place.expert is not None:
            first, adapter = expected.setdefault((place.parameter, place.segment), (module, chosen.get(module)))
            if chosen.get(module) != adapter:
                raise ConfigError(
                    f"{first} and {module} do not have the same adapter: the experts of a layer are adapted together",
                    where="lora_target_modules",
                    fix="name the projection of all experts (gate_proj), with one rank and one alpha",
                )
