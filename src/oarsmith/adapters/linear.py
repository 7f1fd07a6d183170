"""A linear map under adapters, its frozen weight in any form.

Shapes: T tokens, I in features, O out features, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from oarsmith.adapters.adapted import Adapted, Sittings
from oarsmith.adapters.change import Change, LowRank
from oarsmith.adapters.forms import AS_STORED, DENSE, Parts, Stored, WeightForm, low_rank_product, product
from oarsmith.adapters.part import adapter_parts
from oarsmith.kernels.coded import CodedWeight
from oarsmith.models.decoder import Decoder
from oarsmith.models.linear import Linear
from oarsmith.models.spec_parts import LinearSpec

One = tuple[Parts, Tensor | None, Sittings]
"""A single map: its weight [O, I] in its form, bias, and adapters by the segments they sit on."""


class Fake(Protocol):
    """What a map will be when it has been merged and quantized; gradients pass as if nothing were rounded."""

    def weight(self, weight_OI: Tensor) -> Tensor: ...

    def inputs(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Adapt:
    """Rewrites a linear map: changes of some of its segments, by their names, and the form of its weight.

    Attributes:
        fake: the map computes what it will be when quantized (training for it); None: what it is.
    """

    changes: tuple[tuple[str, Change], ...] = ()
    form: WeightForm = DENSE
    fake: Fake | None = None

    def build(self, spec: LinearSpec) -> AdaptedLinear:
        return AdaptedLinear(spec, self)


class AdaptedLinear(Adapted, Linear):
    """A linear map with changes on some of its segments.

    ``weight`` is float until it has been filled, then what the form makes of it.

    Attributes:
        enabled: off, it is the base's map.
    """

    def __init__(self, spec: LinearSpec, adapt: Adapt) -> None:
        super().__init__(spec)
        self.form = adapt.form
        self.fake = adapt.fake
        self.enabled = True
        for name in self.form.names[1:]:
            self.register_buffer(name, None)
        self.put_on(spec, dict(adapt.changes))
        self._filled = False

    def weight_filled(self) -> None:
        """Bring the weight into its form."""
        assert not self._filled, "the weight is in its form already"
        self._filled = True
        if self.form is AS_STORED:
            self.form = DENSE
        if self.form is DENSE:
            return
        weight = self.weight.detach()
        self._keep([self.form.keep(one) for one in ([weight] if self.spec.experts is None else weight.unbind())])

    @property
    def wants_codes(self) -> bool:
        """Whether it takes a quantized checkpoint's codes instead of the floats they stand for."""
        return self.form is AS_STORED

    def take_codes(self, weights: Sequence[CodedWeight]) -> None:
        """The weight, or those of all experts, as a quantized checkpoint has it."""
        assert self.form is AS_STORED and not self._filled, self.form
        self._filled = True
        self.form = form = Stored.form_of(weights[0])
        self._keep([form.parts_of(weight) for weight in weights])

    def _keep(self, every: Sequence[Parts]) -> None:
        parts = every[0] if self.spec.experts is None else tuple(map(torch.stack, zip(*every, strict=True)))
        self.weight = nn.Parameter(parts[0], requires_grad=False)
        for name, part in zip(self.form.names[1:], parts[1:], strict=True):
            self.register_buffer(name, part)

    def parts(self) -> list[Parts]:
        """The weight in its form, or that of each expert."""
        tensors = [self.weight, *(self.get_buffer(name) for name in self.form.names[1:])]
        assert len(tensors) == 1 or self._filled, "the weight has not been loaded"
        if self.spec.experts is None:
            return [tuple(tensors)]
        return list(zip(*(tensor.unbind() for tensor in tensors), strict=True))

    def ones(self) -> list[One]:
        """The map, or that of each expert."""
        parts = self.parts()
        biases = [None] * len(parts) if self.bias is None else self.bias.view(len(parts), -1).unbind()
        return list(zip(parts, biases, self.sittings(), strict=True))

    def forward(self, x_TI: Tensor, counts: Sequence[int] = ()) -> Tensor:
        """``counts``: for stacked maps, how many rows of x go through each."""
        if self.spec.experts is None:
            return self.through(x_TI, self.ones()[0])
        rows = zip(x_TI.split(list(counts)), self.ones(), strict=True)
        return torch.cat([self.through(x, one) for x, one in rows if len(x)])

    def through(self, x_TI: Tensor, one: One) -> Tensor:
        """What one of the maps gives."""
        parts, bias_O, sittings = one
        if self.fake is not None and self.enabled:
            weight_OI, bias_O = self._plain_one(one)
            weight_OI, x_TI = self.fake.weight(weight_OI), self.fake.inputs(x_TI)
            return functional.linear(x_TI, weight_OI.to(x_TI.dtype), None if bias_O is None else bias_O.to(x_TI.dtype))
        if not (self.enabled and self.changes):
            return product(x_TI, parts, bias_O, self.form)
        if all(is_low_rank(change, self.training) for change in self.changes.values()):
            a_RI, b_OR = self.stacked(sittings, x_TI.dtype)
            return low_rank_product(x_TI, parts, bias_O, a_RI, b_OR, self.form)
        return self._changed(x_TI, parts, bias_O, sittings)

    def _changed(self, x_TI: Tensor, parts: Parts, bias_O: Tensor | None, sittings: Sittings) -> Tensor:
        form, width = self.form, self.spec.in_features

        def rows_of(x: Tensor, start: int, stop: int) -> Tensor:
            bias = None if bias_O is None else bias_O[start:stop]
            return product(x, form.rows(parts, start, stop, width), bias, form)

        def weight_of(start: int, stop: int) -> Tensor:
            return form.dense(form.rows(parts, start, stop, width), width)

        whole_TO = None
        if not any(change.turns_input for change in self.changes.values()):
            whole_TO = product(x_TI, parts, bias_O, form)
        on = Changed(self.spec, self.changes, sittings)
        return on(x_TI, whole_TO, bias_O, rows_of, weight_of, training=self.training)

    def reset(self, generator: torch.Generator) -> None:
        """Fresh fp32 adapters."""
        parts, width = self.parts(), self.spec.in_features

        def weight(expert: int, start: int, stop: int) -> Tensor:
            return self.form.dense(self.form.rows(parts[expert], start, stop, width), width)

        self.begin(generator, self.weight.device, weight)

    def look_at(self, base: Linear) -> None:
        """Take another map's frozen weight, in its form, for one's own."""
        self.weight = base.weight
        if isinstance(base, AdaptedLinear) and base.form is not DENSE:
            self.form, self._filled = base.form, True
            for name in self.form.names[1:]:
                self.register_buffer(name, base.get_buffer(name))

    @torch.no_grad()
    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Weight [O, I] or [E, O, I], and bias, of the plain map that does the same, in fp32.

        Raises:
            ConfigError: there is none.
        """
        found = [self.merged_one(one) for one in self.ones()]
        if self.spec.experts is None:
            return found[0]
        made = [bias for _, bias in found if bias is not None]
        return torch.stack([weight for weight, _ in found]), torch.stack(made) if made else None

    def taken_off(self) -> Tensor:
        """The weight [O, I] or [E, O, I] without the changes that are merged into it, in fp32."""
        found = []
        for parts, _, sittings in self.ones():
            weight_OI = self.form.dense(parts, self.spec.in_features).clone()
            for segment, start, stop in self.spec.bounds():
                if (change := self.changes.get(segment.name)) is not None:
                    weight_OI[start:stop] = change.unmerged(sittings[segment.name], weight_OI[start:stop])
            found.append(weight_OI)
        return found[0] if self.spec.experts is None else torch.stack(found)

    @torch.no_grad()
    def merged_one(self, one: One) -> tuple[Tensor, Tensor | None]:
        """The same of one of the maps."""
        return self._plain_one(one)

    def _plain_one(self, one: One) -> tuple[Tensor, Tensor | None]:
        """The same, with gradients."""
        parts, bias_O, sittings = one
        weight_OI = self.form.dense(parts, self.spec.in_features)
        pieces = []
        bias_O = None if bias_O is None else bias_O.float()
        for segment, start, stop in self.spec.bounds():
            change = self.changes.get(segment.name)
            pieces.append(weight_OI[start:stop])
            if change is not None:
                on = sittings[segment.name]
                pieces[-1] = change.merged(on, weight_OI[start:stop])
                own = change.merged_bias(on, None if bias_O is None else bias_O[start:stop])
                assert (own is None) == (bias_O is None), change
                if bias_O is not None and own is not None:
                    bias_O = torch.cat([bias_O[:start], own, bias_O[stop:]])
        return torch.cat(pieces), bias_O


@dataclass(frozen=True)
class Changed:
    """A map's changes with their tensors, apart from the map."""

    spec: LinearSpec
    changes: Mapping[str, Change]
    sittings: Sittings

    def __call__(
        self,
        x_TI: Tensor,
        whole_TO: Tensor | None,
        bias_O: Tensor | None,
        rows_of: Callable[[Tensor, int, int], Tensor],
        weight_of: Callable[[int, int], Tensor],
        *,
        training: bool,
    ) -> Tensor:
        """What the adapted map gives.

        Args:
            whole_TO: the base's x W^T + b, where it is known.
            rows_of: some rows of W, and their bias, applied to an input.
            weight_of: those rows in fp32.
        """
        pieces = []
        for segment, start, stop in self.spec.bounds():
            change = self.changes.get(segment.name)
            if change is None:
                pieces.append(rows_of(x_TI, start, stop) if whole_TO is None else whole_TO[..., start:stop])
                continue
            on, bias = self.sittings[segment.name], None if bias_O is None else bias_O[start:stop]
            x = change.before(on, x_TI)
            known = whole_TO is not None and not change.turns_input
            y = whole_TO[..., start:stop] if known and whole_TO is not None else rows_of(x, start, stop)
            added = change.added(on, x, training=training)
            y = y if added is None else y + added
            pieces.append(change.after(on, y, bias, partial(weight_of, start, stop)))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


def is_low_rank(change: Change, training: bool) -> bool:
    """Whether it only adds a product of two matrices."""
    if not isinstance(change, LowRank) or change.turns_input or change.scales_output:
        return False
    return change.dropout == 0 or not training


def adapted_modules(model: Decoder) -> Iterator[tuple[str, AdaptedLinear]]:
    """The linear maps with a change on them, with their module paths."""
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLinear) and module.changes:
            yield path, module


def attach(model: Decoder, seed: int) -> None:
    """Freeze the base and give every adapter fresh fp32 weights; the same seed gives the same adapter anywhere."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for _, module in adapted_modules(model):
        module.reset(generator)
    for part in adapter_parts(model):
        part.reset(model, generator)


@contextmanager
def disabled(model: Decoder) -> Iterator[None]:
    """Within it the model is its base."""
    modules = [module for _, module in adapted_modules(model)]
    parts = [part for part in adapter_parts(model) if part.enabled]
    before = [module.enabled for module in modules]
    for module in modules:
        module.enabled = False
    for part in parts:
        part.enable(False)
    try:
        yield
    finally:
        for module, enabled in zip(modules, before, strict=True):
            module.enabled = enabled
        for part in parts:
            part.enable(True)
