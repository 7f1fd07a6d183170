"""The parts of a layer's maps that its files name: what schemes, results and layouts speak of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from oarsmith.models.names import ExpertRows, NameMap, Place, Rows, transposed, whole
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


def pieces_of(names: NameMap, layer: int) -> dict[str, list[Piece]]:
    """The pieces of a layer by the paths of their maps, in the order of experts and rows.

    Maps whose files hold all experts in one tensor are left out: no quantized layout has a place for them.
    """
    prefix, found = f"layers.{layer}.", dict[str, list[Piece]]()
    for place in names.places:
        if not place.parameter.startswith(prefix) or place.segment is None or not place.file.endswith(".weight"):
            continue
        piece = _piece(place, place.parameter.removeprefix(prefix).removesuffix(".weight"))
        if piece is not None:
            found.setdefault(piece.map, []).append(piece)
    for pieces in found.values():
        pieces.sort(key=lambda piece: (piece.expert or 0, piece.start))
    return found


def _piece(place: Place, path: str) -> Piece | None:
    stem = place.file.removesuffix(".weight")
    match place.view:
        case Rows(start=start, stop=stop):
            return Piece(stem, path, None, start, stop)
        case ExpertRows(expert=expert, start=start, stop=stop):
            return Piece(stem, path, expert, start, stop)
        case view if view in (whole, transposed):
            return Piece(stem, path, None, 0, None)
    return None


def runs_of(pieces: list[Piece], scheme: Scheme) -> Iterator[tuple[MapScheme, list[Piece]]]:
    """Pieces that follow each other in a map and have the same scheme: they are worked on together."""
    for (_, own), group in groupby(pieces, key=lambda piece: (piece.expert, scheme.of(piece.stem))):
        yield own, list(group)
