"""Adapters that are no change of a projection: a prefix, soft prompts, edited hidden states, single rows, biases.

Such a part lies in ``DecoderSpec.parts`` beside whatever changes sit on projections, and is written into the same file.
Its parameters are fp32 whatever the base's dtype.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from oarsmith.models.families import Family
from oarsmith.models.part import Part
from oarsmith.models.spec import DecoderSpec

if TYPE_CHECKING:
    from oarsmith.models.decoder import Decoder

SpecRewrite = Callable[[Family, DecoderSpec], DecoderSpec]


class AdapterPart(Part):
    """A part with files.

    Attributes:
        what: names it in errors.
        unmergeable: why there is no plain model that does the same; None: there is one.
        beside: other tensors of the file belong to changes of projections.
    """

    what: str
    unmergeable: ClassVar[str | None] = None
    beside: bool = False

    @abstractmethod
    def reset(self, model: Decoder, generator: torch.Generator) -> None:
        """Give the tensors that train fp32 memory and the values that training begins with."""

    @abstractmethod
    def stored(self, model: Decoder) -> Mapping[str, Tensor]:
        """What a file holds, by name."""

    @abstractmethod
    def restore(self, model: Decoder, found: Mapping[str, Tensor]) -> None:
        """Take what a file holds, of the names and shapes that ``stored`` and ``exact`` give.

        Raises:
            CheckpointError: training cannot go on from what a file holds.
        """

    def exact(self) -> Mapping[str, Tensor]:
        """What training goes on from and the file cannot say; it is in a file beside it (see ``exact_file.py``)."""
        return {}

    @abstractmethod
    def peft_config(self, model: Decoder) -> Mapping[str, Any]:
        """The part's keys in ``adapter_config.json``, with ``peft_type`` unless it is ``beside`` changes."""

    def merge(self, model: Decoder) -> None:
        """Make the model without the part do the same, in place."""
        raise NotImplementedError(type(self).__name__)

    def like(self, shape: tuple[int, ...], model: Decoder) -> nn.Parameter:
        """A parameter of zeros, where the model is."""
        return nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=model.device))


class MakePart(Protocol):
    """Builds a part's spec for a model.

    Raises:
        OarsmithError: the method does not fit the model.
    """

    def __call__(self, family: Family, spec: DecoderSpec) -> Any: ...


def adapter_parts(model: Decoder) -> Iterator[AdapterPart]:
    """The model's parts with files."""
    for part in model.own_parts():
        assert isinstance(part, AdapterPart), part
        yield part


def with_parts(inner: SpecRewrite, makers: Collection[MakePart]) -> SpecRewrite:
    """``inner``'s rewrite of a spec, and these parts."""

    def rewrite(family: Family, spec: DecoderSpec) -> DecoderSpec:
        written = inner(family, spec)
        made = tuple(make(family, written) for make in makers)
        return replace(written, parts=(*written.parts, *made))

    return rewrite
