"""What was measured as the package's support.json, and that as Markdown for docs/support.md and the README."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path

from oarsmith.models import families
from oarsmith.models.families import support
from oarsmith.models.families.support import Support, SupportColumn, SupportRow

from .columns import COLUMNS
from .rows import ROWS

ROOT = Path(__file__).parents[2]
DOC, README = ROOT / "docs" / "support.md", ROOT / "README.md"
BEGIN, END = "<!-- support table: written by `make matrix` -->", "<!-- end of the support table -->"
_INTRODUCTION = """# What works for which family

Every mark was earned by a test of this commit (`tests/matrix`, a tiny random model of each family); the file is
written by `make matrix`, and the test fails when it does not say what was measured. `oarsmith models` prints the same.
"""


@dataclass(frozen=True)
class Measured:
    """(row, column) -> what the cell says, or why it is empty."""

    cells: dict[tuple[str, str], str]
    gaps: dict[tuple[str, str], str]


def to_support(measured: Measured) -> Support:
    """The table as the package carries it."""
    rows = []
    for name, row in ROWS.items():
        family = families.find(row.config)
        cells = {column: measured.cells[name, column] for column in COLUMNS if (name, column) in measured.cells}
        gaps = {column: measured.gaps[name, column] for column in COLUMNS if (name, column) in measured.gaps}
        rows.append(
            SupportRow(
                name=name,
                family=family.name,
                model_type=str(row.config["model_type"]),
                models=row.models,
                cells=cells,
                gaps=gaps,
            )
        )
    columns = tuple(SupportColumn(key=key, title=c.title, meaning=c.meaning) for key, c in COLUMNS.items())
    return Support(columns=columns, rows=tuple(rows))


def documents(table: Support) -> dict[str, str]:
    """File name -> what it has to say: the whole of docs/support.md, the part of the README between the markers."""
    return {"docs/support.md": _support_page(table), "README.md": markdown(table)}


def committed_documents() -> dict[str, str]:
    """The same, as it is in the files."""
    found = re.search(rf"{re.escape(BEGIN)}\n(.*?){re.escape(END)}", README.read_text(encoding="utf-8"), re.DOTALL)
    page = DOC.read_text(encoding="utf-8") if DOC.is_file() else ""
    return {"docs/support.md": page, "README.md": found.group(1) if found else ""}


def write(measured: Measured) -> None:
    """Bring all three files up to date."""
    table = to_support(measured)
    support.PATH.write_text(dumps(asdict(table), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    texts, readme = documents(table), README.read_text(encoding="utf-8")
    DOC.write_text(texts["docs/support.md"], encoding="utf-8")
    pattern = rf"{re.escape(BEGIN)}\n.*?{re.escape(END)}"
    assert re.search(pattern, readme, re.DOTALL), f"README.md has no line {BEGIN}"
    readme = re.sub(pattern, lambda _: f"{BEGIN}\n{texts['README.md']}{END}", readme, flags=re.DOTALL)
    README.write_text(readme, encoding="utf-8")


def markdown(table: Support) -> str:
    """The table: a tick for yes, the word otherwise, a dash for a gap."""
    lines = [["family (`model_type`)", "models", *(column.title for column in table.columns)]]
    lines.append(["---"] * len(lines[0]))
    for row in table.rows:
        label = f"{row.name} (`{row.model_type}`)" if row.name != row.model_type else f"`{row.name}`"
        cells = [row.cells.get(column.key, "–").replace("yes", "✓") for column in table.columns]
        lines.append([label, row.models, *cells])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _support_page(table: Support) -> str:
    meanings = "".join(f"- **{column.title}**: {column.meaning}\n" for column in table.columns)
    reasons = support.reasons(table).items()
    gaps = "".join(f"- {title}, {', '.join(names)}: {reason}\n" for (title, reason), names in reasons)
    return f"{_INTRODUCTION}\n{markdown(table)}\n## The columns\n\n{meanings}\n## The gaps\n\n{gaps}"
