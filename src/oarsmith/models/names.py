"""Invertible name operators: where each tensor of a checkpoint file lies in the decoder's parameters.

An operator names a *view* of a parameter. Loading copies the file's tensor into the view, saving copies the view out,
so one description serves both directions, a round trip is bit for bit, and loading streams: no second copy of the
weights. The list of a family must consume every tensor of the file and fill every element of every parameter (checked).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from oarsmith.models.spec_parts import LayerNormSpec, LinearSpec, NormSpec


@dataclass(frozen=True)
class Place:
    """File tensor ``file`` is ``view(parameter)``.

    Args:
        segment: name of the projection inside a fused linear map, for weights and biases of linear maps.
        expert: which of the stacked experts; None for all other tensors.
        shape: of the file's tensor, where the view has the same elements under more axes.
    """

    file: str
    parameter: str
    view: Callable[[Tensor], Tensor]
    segment: str | None = None
    expert: int | None = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Ignored:
    """File tensors matching ``pattern`` (regex, full match) carry no weights: buffers older libraries stored."""

    pattern: str
    why: str


@dataclass(frozen=True)
class Duplicate:
    """File tensor ``file`` may repeat parameter ``parameter`` (a tied head stored twice): not read, not written."""

    file: str
    parameter: str


@dataclass(frozen=True)
class NameMap:
    """All operators of a model, under the names its family writes.

    ``optional_prefix``: a leading path that some files omit (they were saved from the model without its head).
    """

    operators: tuple[Place | Ignored | Duplicate, ...]
    optional_prefix: str = ""

    def without(self, parameter: str) -> NameMap:
        """All but what lies in one parameter, which the files do not have."""
        kept = (one for one in self.operators if not isinstance(one, Place) or one.parameter != parameter)
        return replace(self, operators=tuple(kept))

    @property
    def places(self) -> tuple[Place, ...]:
        return tuple(operator for operator in self.operators if isinstance(operator, Place))


def whole(tensor: Tensor) -> Tensor:
    """The parameter as it is."""
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    """The matrix transposed (Conv1D files store [in, out])."""
    return tensor.t()


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of the parameter."""

    start: int
    stop: int

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor[self.start : self.stop]


@dataclass(frozen=True)
class ExpertRows:
    """Rows [start, stop) of one expert of a stacked parameter."""

    expert: int
    start: int
    stop: int

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor[self.expert, self.start : self.stop]


def linear(file: str, parameter: str, spec: LinearSpec) -> Iterator[Place]:
    """One file tensor per segment, ``{file}.{segment}.weight`` and ``.bias``, stacked in the fused parameter."""
    for segment, start, stop in spec.bounds():
        view = whole if len(spec.segments) == 1 else Rows(start, stop)
        for kind in ("weight", "bias") if spec.bias else ("weight",):
            yield Place(join(file, segment.name, kind), f"{parameter}.{kind}", view, segment.name)


def conv1d(file: str, parameter: str, spec: LinearSpec) -> Iterator[Place]:
    """As :func:`linear` for one segment whose weight is stored transposed (GPT-2)."""
    (segment,) = spec.segments
    yield Place(join(file, segment.name, "weight"), f"{parameter}.weight", transposed, segment.name)
    if spec.bias:
        yield Place(join(file, segment.name, "bias"), f"{parameter}.bias", whole, segment.name)


def expert_linears(file: str, parameter: str, spec: LinearSpec) -> Iterator[Place]:
    """One file tensor per expert and segment: ``file`` holds ``{}`` where the expert's number stands."""
    assert spec.experts is not None, spec
    for expert in range(spec.experts):
        for segment, start, stop in spec.bounds():
            for kind in ("weight", "bias") if spec.bias else ("weight",):
                name = join(file.format(expert), segment.name, kind)
                view = ExpertRows(expert, start, stop)
                yield Place(name, f"{parameter}.{kind}", view, segment.name, expert)


@dataclass(frozen=True)
class Interleaved:
    """Stacked maps transposed, their outputs in ``parts`` equal runs taken in turn: [E, (g u), ..] to [E, .., g, u]."""

    parts: int

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(1, (self.parts, -1)).movedim((1, 2), (-1, -2))


def stacked_experts(file: str, parameter: str, spec: LinearSpec, parts: int) -> Iterator[Place]:
    """One file tensor [expert, in, out] and one [expert, out] of biases, the ``parts`` runs of outputs interleaved."""
    (segment,) = spec.segments
    assert spec.experts is not None, spec
    name, view = join(file, segment.name), Interleaved(parts)
    shape = (spec.experts, spec.in_features, spec.out_features)
    yield Place(name, f"{parameter}.weight", view, shape=shape)
    if spec.bias:
        yield Place(f"{name}_bias", f"{parameter}.bias", view, shape=(spec.experts, spec.out_features))


def norm(file: str, parameter: str, spec: NormSpec) -> Iterator[Place]:
    """Weight, and bias where the norm has one."""
    if isinstance(spec, LayerNormSpec) and not spec.affine:
        return
    yield Place(f"{file}.weight", f"{parameter}.weight", whole)
    if isinstance(spec, LayerNormSpec) and spec.bias:
        yield Place(f"{file}.bias", f"{parameter}.bias", whole)


def join(*parts: str) -> str:
    """Parts of a tensor's name with dots between them; empty ones are left out."""
    return ".".join(part for part in parts if part)
