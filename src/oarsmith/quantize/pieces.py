"""The parts of a layer's maps that its files name: what schemes, results and layouts speak of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from oarsmith.models.block import Block
from oarsmith.models.linear import Linear
from oarsmith.models.names import ExpertRows, NameMap, Place, Rows
from oarsmith.quantize.scheme import MapScheme, Scheme


@dataclass(frozen=True)
class Piece:
    """Rows of a linear map, or of one expert's.

    Attributes:
        stem: their name in the files, without ``.weight``.
        map: path of the map in its block.
        expert: None for a single map.
        start, stop: rows; ``stop`` None: to the last.
    """

    stem: str
    map: str
    expert: int | None
    start: int
    stop: int | None


def pieces_of(names: NameMap, layer: int, block: Block) -> dict[str, list[Piece]]:
    """The pieces of a layer by the paths of their maps, in the order of experts and rows.

    Where a tensor of the files holds all experts, each of them is a piece, all of the same name.
    """
    prefix, found = f"layers.{layer}.", dict[str, list[Piece]]()
    for place in names.places:
        if not place.parameter.startswith(prefix) or not place.parameter.endswith(".weight"):
            continue
        path = place.parameter.removeprefix(prefix).removesuffix(".weight")
        module = block.get_submodule(path)
        if isinstance(module, Linear):
            found.setdefault(path, []).extend(_pieces(place, path, module.spec.experts))
    for pieces in found.values():
        pieces.sort(key=lambda piece: (piece.expert or 0, piece.start))
    return found


def _pieces(place: Place, path: str, experts: int | None) -> Iterator[Piece]:
    stem = place.file.removesuffix(".weight")
    match place.view:
        case Rows(start=start, stop=stop):
            yield Piece(stem, path, None, start, stop)
        case ExpertRows(expert=expert, start=start, stop=stop):
            yield Piece(stem, path, expert, start, stop)
        case _ if experts is None:
            yield Piece(stem, path, None, 0, None)
        case _:
            yield from (Piece(stem, path, expert, 0, None) for expert in range(experts))


def runs_of(pieces: list[Piece], scheme: Scheme) -> Iterator[tuple[MapScheme, list[Piece]]]:
    """Pieces that follow each other in a map and have the same scheme: they are worked on together."""

    def kind(piece: Piece) -> tuple[object, ...]:
        own = scheme.of(piece.stem)
        # Where rows share scales, those of another tensor of the files must not be among them.
        apart = own.weights is not None and own.weights.rows != 1
        return piece.expert, own, piece.stem if apart else None

    for _, group in groupby(pieces, key=kind):
        run = list(group)
        yield scheme.of(run[0].stem), run
