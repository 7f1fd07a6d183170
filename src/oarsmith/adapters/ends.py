"""Changes of the two ends of a decoder: the table that tokens are looked up in, and the matrix that makes logits.

The embedding is a linear map of one-hot tokens, W [E, V]: the table transposed. What a change adds to it is never
multiplied out: a token takes its column of A. The head is a map W [V, D], and B A x a second product beside W x, so
losses that never hold all logits stay as they are. Where the head is tied to the table each end is still changed for
itself, as in PEFT, and merging gives the head a matrix of its own.

Shapes: T tokens, N chosen tokens, V vocabulary, E table row, D what the head reads, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from oarsmith.adapters.adapted import Adapted
from oarsmith.adapters.change import Change, LowRank
from oarsmith.adapters.part import AdapterPart
from oarsmith.errors import ConfigError
from oarsmith.models.families.naming import SCORE
from oarsmith.models.names import Duplicate, NameMap, Place, whole
from oarsmith.models.spec import DecoderSpec
from oarsmith.models.spec_parts import LinearSpec, Segment

if TYPE_CHECKING:
    from oarsmith.models.decoder import Decoder

EMBEDDING, HEAD = "embedding", "head"
_PARAMETERS = {f"{EMBEDDING}.weight": EMBEDDING, f"{HEAD}.weight": HEAD}


def end_places(names: NameMap) -> dict[str, Place]:
    """The embedding and the head by their names in the family's own spelling; a tied head has its own place too.

    A head of scores is none: it trains whole, with any adapter.
    """
    found = {}
    for operator in names.operators:
        if isinstance(operator, Place) and operator.parameter in _PARAMETERS and operator.file != SCORE:
            file, parameter = operator.file, operator.parameter
        elif isinstance(operator, Duplicate) and operator.parameter == f"{EMBEDDING}.weight":
            file, parameter = operator.file, f"{HEAD}.weight"
        else:
            continue
        module = file.removesuffix(".weight")
        found[module] = Place(file, parameter, whole, module.rsplit(".", 1)[-1])
    return found


def end_of(place: Place) -> str | None:
    """``embedding`` or ``head``; None: it is a projection of the layers."""
    return _PARAMETERS.get(place.parameter)


def end_linear(place: Place, spec: DecoderSpec) -> LinearSpec:
    """An end as a linear map."""
    assert place.segment is not None, place
    if end_of(place) == EMBEDDING:
        segment = Segment(name=place.segment, size=spec.embedding.size)
        return LinearSpec(in_features=spec.vocab_size, segments=(segment,))
    projection = spec.head.projection
    width = spec.hidden_size if projection is None else projection.out_features
    return LinearSpec(in_features=width, segments=(Segment(name=place.segment, size=spec.vocab_size),))


def as_end(module: str, place: Place, change: Change, spec: DecoderSpec) -> Change:
    """The change as it sits on an end.

    Raises:
        ConfigError: it cannot.
    """
    if end_of(place) == EMBEDDING:
        found, can = change.on_table(), "LoRA can"
    else:
        plain = isinstance(change, LowRank) and not change.turns_input and not change.scales_output
        found = change if plain and not spec.head.normalized else None
        can = "methods that add a product of two matrices can, where its rows are not normalized"
    if found is None:
        raise ConfigError(
            f"this method cannot change {module}: {can}",
            where="lora_target_modules",
            fix="leave it out, or take adapter_type lora",
        )
    return found


@dataclass(frozen=True, kw_only=True)
class EndsSpec:
    """The maps that are changed, with their changes."""

    embedding: tuple[LinearSpec, Change] | None = None
    head: tuple[LinearSpec, Change] | None = None
    padding_id: int | None = None

    what: ClassVar[str] = "a change of the embedding or the head"
    num_virtual: ClassVar[int] = 0
    prefixes: ClassVar[bool] = True

    def build(self, spec: DecoderSpec) -> Ends:
        return Ends(self)


class Ends(AdapterPart):
    """Its tensors lie under ``embedding`` and ``head``; files hold them as they hold those of projections."""

    what = EndsSpec.what
    beside = True

    def __init__(self, spec: EndsSpec) -> None:
        super().__init__()
        self.spec = spec
        self.maps = nn.ModuleDict()
        for name, made in ((EMBEDDING, spec.embedding), (HEAD, spec.head)):
            if made is not None:
                linear, change = made
                self.maps[name] = end = Adapted()
                end.put_on(linear, {linear.segments[0].name: change})

    def changed_maps(self) -> dict[str, Adapted]:
        """The maps by their end."""
        return {name: found for name, found in self.maps.items() if isinstance(found, Adapted)}

    def reset(self, model: Decoder, generator: torch.Generator) -> None:
        for end, found in self.changed_maps().items():

            def weight(_: int, start: int, stop: int, end: str = end) -> Tensor:
                return _map(model, end)[start:stop]

            found.begin(generator, model.device, weight)

    def looked_up(self, ids_T: Tensor, x_TE: Tensor) -> Tensor:
        table = self.changed_maps().get(EMBEDDING)
        if table is None:
            return x_TE
        a_rV, b_Er = table.stacked(table.sittings()[0], torch.float32)
        rows_Tr = functional.embedding(ids_T.clamp_min(0), a_rV.t(), self.spec.padding_id)
        return x_TE + functional.linear(rows_Tr.to(x_TE.dtype), b_Er.to(x_TE.dtype))

    def beside_matrix(self, inputs_ND: Tensor) -> tuple[Tensor, Tensor] | None:
        head = self.changed_maps().get(HEAD)
        if head is None:
            return None
        (change,) = head.changes.values()
        assert isinstance(change, LowRank), change
        a_rD, b_Vr = head.stacked(head.sittings()[0], inputs_ND.dtype)
        return functional.linear(functional.dropout(inputs_ND, change.dropout, self.training), a_rD), b_Vr

    def stored(self, model: Decoder) -> Mapping[str, Tensor]:
        return {}

    def restore(self, model: Decoder, found: Mapping[str, Tensor]) -> None:
        """They are restored where those of projections are."""

    def peft_config(self, model: Decoder) -> Mapping[str, Any]:
        return {}

    def merge(self, model: Decoder) -> None:
        if model.spec.head.tied:
            untie(model)
        for end, found in self.changed_maps().items():
            (on,), (change,) = found.sittings()[0].values(), found.changes.values()
            merged = change.merged(on, _map(model, end))
            base_matrix(model, end).copy_(merged.t() if end == EMBEDDING else merged)

    def taken_off(self, model: Decoder) -> Iterator[tuple[Tensor, Tensor]]:
        """Each changed matrix of a model that this was merged into, and in fp32 what it was before."""
        for end, found in self.changed_maps().items():
            (on,), (change,) = found.sittings()[0].values(), found.changes.values()
            before = change.unmerged(on, _map(model, end))
            yield base_matrix(model, end), before.t() if end == EMBEDDING else before


def base_matrix(model: Decoder, end: str | None) -> Tensor:
    """The base's table [V, E] or output matrix [V, D]."""
    own = model.head.weight if end == HEAD else None
    return (model.embedding.weight if own is None else own).detach()


def _map(model: Decoder, end: str) -> Tensor:
    """W of an end in fp32: the table transposed [E, V], or the output matrix [V, D]."""
    matrix = base_matrix(model, end).float()
    return matrix.t() if end == EMBEDDING else matrix


def untie(model: Decoder) -> None:
    """Give a tied head a matrix of its own, in place, and say so in spec and config."""
    assert model.spec.head.tied and model.head.weight is None
    model.head.weight = nn.Parameter(model.embedding.weight.detach().clone(), requires_grad=False)
    model.head.spec = replace(model.head.spec, tied=False)
    model.spec = replace(model.spec, head=model.head.spec)
    model.config["tie_word_embeddings"] = False
