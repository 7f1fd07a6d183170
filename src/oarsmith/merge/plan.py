"""What is to be written, tensor by tensor, before a weight is read: whose tensors, by which numbers.

Everything that can be wrong with names, shapes and parameters is found here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from oarsmith.checkpoint.fill import file_infos
from oarsmith.checkpoint.hf import DTYPES
from oarsmith.errors import ConfigError, ModelError
from oarsmith.merge.models import MergeModel, at_layer, with_layers
from oarsmith.merge.parameters import Settings, look_up
from oarsmith.merge.recipe import Recipe, SliceSpec
from oarsmith.merge.registry import METHODS, Method
from oarsmith.merge.vocabulary import Vocabulary
from oarsmith.models import families


@dataclass(frozen=True)
class Source:
    """A tensor of a model, by its number."""

    model: int
    name: str


@dataclass(frozen=True)
class TensorTask:
    """One tensor to write.

    Attributes:
        sources: the models that the method merges, in its order; ``base`` beside them.
        vocabulary: its rows are tokens and are aligned first.
        value: the tensor itself, where it comes from no model (a router).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[Source, ...]
    base: Source | None
    own: tuple[Mapping[str, Any], ...]
    shared: Mapping[str, Any]
    vocabulary: bool = False
    value: Tensor | None = None


@dataclass(frozen=True)
class Plan:
    """A merge.

    Attributes:
        tasks: in the order of the written files.
        config: ``config.json`` of the result.
        reference: number of the model that config and tokenizer come from.
        idle: parameters that the recipe gives and the method does not have.
    """

    tasks: tuple[TensorTask, ...]
    config: Mapping[str, Any]
    reference: int
    idle: tuple[str, ...]


@dataclass(frozen=True)
class _Slice:
    """A slice with its models found: numbers and first layers of the sources, and their settings."""

    spec: SliceSpec
    models: tuple[int, ...]
    starts: tuple[int, ...]
    num_layers: int
    base: int | None
    base_start: int

    @property
    def reference(self) -> tuple[int, int]:
        """The model whose tensors are gone through, and its first layer."""
        return (self.models[0], self.starts[0]) if self.base is None else (self.base, self.base_start)


class Planner:
    """Makes the plan of a recipe.

    Args:
        models: those of ``recipe.models``, opened, in that order.
        vocabulary: how rows are aligned; None: they are taken as they are.
    """

    def __init__(
        self, recipe: Recipe, models: Sequence[MergeModel], method: Method, vocabulary: Vocabulary | None
    ) -> None:
        self._recipe, self._models, self._method, self._vocabulary = recipe, models, method, vocabulary
        self._number = {model.reference: index for index, model in enumerate(models)}
        self._parameters = {one.name: one for one in method.parameters}
        self._dtype = dtype_of(recipe.out_dtype or recipe.dtype)

    def plan(self) -> Plan:
        """The plan.

        Raises:
            OarsmithError: models that do not fit together (the tensor named), parameters that are missing or unknown.
        """
        idle = self._idle()
        slices = [self._slice(one, f"slices[{index}]") for index, one in enumerate(self._recipe.slices)]
        reference = self._number[self._recipe.base] if self._recipe.base is not None else slices[0].reference[0]
        config = self._config(slices, reference)
        found = [task for made in self._tasks(slices) for task in made]
        return Plan(tuple(self._in_order(found, config, reference)), config, reference, idle)

    def _slice(self, spec: SliceSpec, where: str) -> _Slice:
        layers, models, starts = [], [], []
        for source in spec.sources:
            model = self._models[self._number[source.model]]
            start, stop = source.layers or (0, model.num_layers)
            if stop > model.num_layers:
                raise ConfigError(
                    f"{source.model} has {model.num_layers} layers, and [{start}, {stop}) are asked for",
                    where=where,
                    fix=f"end at {model.num_layers} at most",
                )
            layers.append(stop - start)
            models.append(self._number[source.model])
            starts.append(start)
        if len(set(models)) != len(models):
            twice = next(one.model for i, one in enumerate(spec.sources) if models.index(models[i]) != i)
            raise ConfigError(f"{twice} is named twice", where=where, fix="name it once, with the sum of its weights")
        name = spec.base or self._recipe.base
        base = None if name is None else self._number[name]
        if base is not None and base not in models:
            # Of a slice the same layers, as far as it has them; else all that it has.
            base_start, count = starts[0], self._models[base].num_layers
            layers.append(count if spec.sources[0].layers is None else min(layers[0], count - base_start))
        else:
            base_start = 0 if base is None else starts[models.index(base)]
        if len(set(layers)) != 1:
            raise ModelError(
                f"the models have different numbers of layers: {', '.join(map(str, layers))}",
                where=where,
                fix="say which layers belong together: slices with layer_range",
            )
        return self._roles(_Slice(spec, tuple(models), tuple(starts), layers[0], base, base_start), where)

    def _roles(self, one: _Slice, where: str) -> _Slice:
        """The slice with its base taken out of the models, as the method wants it."""
        method = self._method
        models = [(index, start) for index, start in zip(one.models, one.starts, strict=True)]
        if method.base == "none":
            one = replace(one, base=None, base_start=0)
        elif one.base is not None:
            models = [pair for pair in models if pair[0] != one.base]
        elif method.base in ("required", "one of them"):
            raise ConfigError(
                f"{method.name} needs a base model: what models add to it is merged",
                where="base_model",
                fix="name it: base_model: PATH",
            )
        if len(models) < method.least or (method.most is not None and len(models) > method.most):
            most = method.most
            wanted = str(method.least) if most == method.least else f"{method.least} or more" if most is None else ""
            beside = " beside the base" if method.base != "none" else ""
            raise ConfigError(
                f"{method.name} merges {wanted or f'{method.least} to {most}'} models{beside}, not {len(models)}",
                where=where,
                fix="change the models, or the method",
            )
        return replace(one, models=tuple(pair[0] for pair in models), starts=tuple(pair[1] for pair in models))

    def _tasks(self, slices: Sequence[_Slice]) -> Iterator[list[TensorTask]]:
        yield [task for one in slices[:1] for task in self._outside(one, last=False)]
        offset = 0
        for one in slices:
            for index in range(one.num_layers):
                yield list(self._layer(one, index, offset + index))
            offset += one.num_layers
        yield [task for one in slices[-1:] for task in self._outside(one, last=True)]

    def _outside(self, one: _Slice, *, last: bool) -> Iterator[TensorTask]:
        index, _ = one.reference
        chosen = [name for name, place in self._models[index].places.items() if _outside(place.layer, place.last, last)]
        involved = {*one.models, *([] if one.base is None else [one.base])}
        for other in involved:
            model = self._models[other]
            theirs = [name for name, place in model.places.items() if _outside(place.layer, place.last, last)]
            self._require_same(index, set(chosen), other, set(theirs))
        for name in chosen:
            names = dict.fromkeys(involved, name)
            yield self._task(one, name, names, 0.0)  # as mergekit: that of the first layer

    def _layer(self, one: _Slice, offset: int, out: int) -> Iterator[TensorTask]:
        index, start = one.reference
        place = offset / (one.num_layers - 1) if one.num_layers > 1 else 1.0
        pairs = [*zip(one.models, one.starts, strict=True), *([] if one.base is None else [(one.base, one.base_start)])]
        names = self._names(index, start + offset)
        for other, first in pairs:
            own = {at_layer(name, first + offset, start + offset) for name in self._names(other, first + offset)}
            self._require_same(index, set(names), other, own)
        for name in names:
            used = {other: at_layer(name, start + offset, first + offset) for other, first in pairs}
            yield self._task(one, at_layer(name, start + offset, out), used, place)

    def _names(self, model: int, layer: int) -> list[str]:
        return [name for name, place in self._models[model].places.items() if place.layer == layer]

    def _require_same(self, index: int, names: set[str], other: int, theirs: set[str]) -> None:
        model = self._models[other]
        missing = sorted(name for name in names - theirs if name not in model.tied)
        surplus = sorted(theirs - names)
        if missing or surplus:
            name = (missing or surplus)[0]
            have, lack = (self._models[index], model) if missing else (model, self._models[index])
            hint = difflib.get_close_matches(name, sorted(names ^ theirs - {name}), n=1)
            near = f" (it has {hint[0]})" if hint and hint[0] != name else ""
            raise ModelError(
                f"tensor {name} is in {have.reference} and not in {lack.reference}{near}",
                where=name,
                fix="merge models of one architecture; a tied head can be stored apart with oarsmith convert",
            )

    def _task(self, one: _Slice, name: str, names: Mapping[int, str], place: float) -> TensorTask:
        base = None if one.base is None else Source(one.base, names[one.base])
        sources = tuple(Source(index, names[index]) for index in one.models)
        if self._method.base == "one of them" and base is not None:
            sources, base = (base, *sources), None
        reference = Source(one.reference[0], names[one.reference[0]])
        rows = self._models[reference.model].places[reference.name].vocabulary
        shape = self._shape(name, [*sources, *([] if base is None else [base])], rows=rows)
        own = tuple(self._own(one, source, name, place) for source in sources)
        shared = {
            key: parameter.checked(look_up(self._general(one), key, name, place), f"parameters of {name}")
            for key, parameter in self._parameters.items()
            if not parameter.per_model
        }
        stored = self._models[reference.model].dtype_of(reference.name)
        dtype = self._dtype or stored
        return TensorTask(name, shape, dtype, sources, base, own, shared, rows and self._vocabulary is not None)

    def _general(self, one: _Slice) -> list[Settings]:
        return [one.spec.parameters, *self._recipe.parameters]

    def _own(self, one: _Slice, source: Source, name: str, place: float) -> dict[str, Any]:
        reference = self._models[source.model].reference
        special = [spec.parameters for spec in one.spec.sources if spec.model == reference]
        layers = [*special, *self._general(one)]
        return {
            key: parameter.checked(look_up(layers, key, name, place), f"{reference}, for {name}")
            for key, parameter in self._parameters.items()
            if parameter.per_model
        }

    def _shape(self, name: str, sources: Sequence[Source], *, rows: bool) -> tuple[int, ...]:
        shapes = [self._models[one.model].shapes[self._stored(one)] for one in sources]
        aligned = rows and self._vocabulary is not None
        first = shapes[0]
        for source, shape in zip(sources, shapes, strict=True):
            if (shape[1:] if aligned else shape) != (first[1:] if aligned else first):
                tokens = rows and shape[1:] == first[1:]
                raise ModelError(
                    f"tensor {name} has shape {first} in {self._models[sources[0].model].reference} and {shape} in "
                    f"{self._models[source.model].reference}; nothing is cut",
                    where=name,
                    fix="align their vocabularies: tokenizer_source: union (or base)"
                    if tokens
                    else "merge models of one size",
                )
        if aligned:
            assert self._vocabulary is not None
            return (self._vocabulary.num_rows, *first[1:])
        return first

    def _stored(self, source: Source) -> str:
        return self._models[source.model].tied.get(source.name, source.name)

    def _config(self, slices: Sequence[_Slice], reference: int) -> dict[str, Any]:
        model = self._models[reference]
        config = dict(model.config)
        chosen = [one.reference[1] + index for one in slices for index in range(one.num_layers)]
        if chosen != list(range(model.num_layers)):
            config = with_layers(config, chosen, model.num_layers)
        if self._vocabulary is not None:
            config["vocab_size"] = self._vocabulary.num_rows
        return config

    def _in_order(self, tasks: Sequence[TensorTask], config: Mapping[str, Any], reference: int) -> Iterator[TensorTask]:
        """In the order of the family's files, each in the dtype that a model of the recipe's has it in."""
        if self._models[reference].spec is None:
            yield from tasks
            return
        family, spec = families.build_spec(config)
        dtype = self._dtype or self._models[reference].dtype
        infos = file_infos(spec, config, family.names(spec), dtype)
        made = {task.name: task for task in tasks}
        odd = sorted(set(infos) ^ set(made))
        if odd:
            what = "is missing from" if odd[0] in infos else "has no place in"
            raise ModelError(
                f"tensor {odd[0]} {what} the model that would be written",
                where=odd[0],
                fix="stack layers so that the result is a model of its family",
            )
        for name, info in infos.items():
            task = made[name]
            if task.shape != info.shape:
                raise ModelError(
                    f"tensor {name} would have shape {task.shape}, config.json asks for {info.shape}",
                    where=name,
                    fix="merge models of one size",
                )
            wanted = info.dtype if self._dtype is not None else task.dtype
            yield replace(task, dtype=wanted)

    def _idle(self) -> tuple[str, ...]:
        """Parameters of other methods; unknown ones are refused."""
        recipe = self._recipe
        layers = [*recipe.parameters, *(one.parameters for one in recipe.slices)]
        layers += [source.parameters for one in recipe.slices for source in one.sources]
        given = dict.fromkeys(name for settings in layers for name in settings)
        known = {one.name for method in METHODS.values() for one in method.parameters}
        for name in given:
            if name not in known | set(self._parameters):
                guess = difflib.get_close_matches(name, sorted(known | set(self._parameters)), n=1)
                raise ConfigError(
                    f"unknown parameter '{name}'",
                    where="parameters",
                    fix=f"did you mean '{guess[0]}'?"
                    if guess
                    else f"{self._method.name} has {', '.join(self._parameters) or 'none'}",
                )
        return tuple(name for name in given if name not in self._parameters)


def _outside(layer: int | None, behind: bool, last: bool) -> bool:
    return layer is None and behind is last


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype that a recipe names; None: each tensor's own.

    Raises:
        ConfigError: no such dtype.
    """
    if name is None or name == "auto":
        return None
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(name, name)
    if short not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}", where="dtype", fix="use float32, bfloat16 or float16")
    return DTYPES[short]
