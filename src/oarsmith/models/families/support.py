"""What works for which family: the table that the tests measured, shipped with the package.

``tests/matrix`` writes support.json and fails when it does not say what was measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PATH = Path(__file__).with_name("support.json")


@dataclass(frozen=True, kw_only=True)
class SupportColumn:
    """A capability: its heading, and what a mark means."""

    key: str
    title: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class SupportRow:
    """A family, or a variant of one.

    Args:
        cells: column key -> "yes" or the oracle's name.
        gaps: column key -> why there is no mark.
    """

    name: str
    family: str
    model_type: str
    models: str
    cells: Mapping[str, str]
    gaps: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Support:
    columns: tuple[SupportColumn, ...]
    rows: tuple[SupportRow, ...]


def read() -> Support:
    """The table of this version."""
    raw = json.loads(PATH.read_text(encoding="utf-8"))
    return Support(
        columns=tuple(SupportColumn(**column) for column in raw["columns"]),
        rows=tuple(SupportRow(**row) for row in raw["rows"]),
    )


def reasons(table: Support) -> dict[tuple[str, str], list[str]]:
    """(column's title, why there is no mark) -> the rows it is true of."""
    found: dict[tuple[str, str], list[str]] = {}
    titles = {column.key: column.title for column in table.columns}
    for row in table.rows:
        for key, reason in row.gaps.items():
            found.setdefault((titles[key], reason), []).append(row.name)
    return found
