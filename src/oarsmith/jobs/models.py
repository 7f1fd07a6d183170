"""``oarsmith models``: the model families this version knows, and what works for each."""

from __future__ import annotations

from oarsmith.config.resolved import Resolved
from oarsmith.config.tools import ModelsConfig
from oarsmith.models.families import support


def run(resolved: Resolved[ModelsConfig]) -> None:
    """Print a line per family (the ``model_type`` its config.json has, what it stands for, what does not work), and
    what is tested for each.
    """
    table = support.read()
    titles = {column.key: column.title.strip("`") for column in table.columns}
    lines = [("family", "model_type", "models", "all but (why: below)")]
    for row in table.rows:
        gaps = ", ".join(titles[key] for key in row.gaps)
        lines.append((row.name, row.model_type, row.models, gaps or "-"))
    widths = [max(len(line[index]) for line in lines) for index in range(3)]
    for *cells, gaps in lines:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)), gaps, sep="  ")
    print("\nFor every family, tested on a tiny model of it in this version:")
    for column in table.columns:
        print(f"  {titles[column.key]:<14}  {column.meaning}")
    print("\nNot:")
    for (title, reason), names in support.reasons(table).items():
        print(f"  {title.strip('`')}, {', '.join(names)}: {reason}")
