"""The model card and the lineage of a merged model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from oarsmith._version import __version__
from oarsmith.atomic import atomic_write_text
from oarsmith.merge.run import Input, Merged

LINEAGE = "merge_lineage.json"
RECIPE = "merge_recipe.yaml"


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """YAML of a recipe."""
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100)


def write_card(
    folder: Path, report: Merged, recipe: Mapping[str, Any], seed: int, table: Sequence[Sequence[str]] = ()
) -> None:
    """Write README.md, the lineage and the recipe into a directory.

    Args:
        recipe: as it can be given to ``oarsmith merge`` again.
        table: of an evaluation, its header first.
    """
    text = recipe_text(recipe)
    atomic_write_text(folder / RECIPE, text)
    lineage = {
        "tool": f"oarsmith {__version__}",
        "recipe": dict(recipe),
        "seed": seed,
        "inputs": [
            {
                "model": one.reference,
                "sha256": one.hash,
                "num_tensors": one.num_tensors,
                "adapter_sha256": one.adapter_hash,
            }
            for one in report.inputs
        ],
        "output": {
            "sha256": report.hash,
            "num_tensors": report.num_tensors,
            "num_parameters": report.num_parameters,
        },
    }
    atomic_write_text(folder / LINEAGE, json.dumps(lineage, indent=1, ensure_ascii=False) + "\n")
    atomic_write_text(folder / "README.md", _card(report, text, seed, table))


def _card(report: Merged, recipe: str, seed: int, table: Sequence[Sequence[str]]) -> str:
    names = [one.reference for one in report.inputs]
    head = yaml.safe_dump({"base_model": names, "tags": ["merge", "oarsmith"], "library_name": "transformers"})
    lines = ["---", head.rstrip(), "---", "", "# A merge", ""]
    lines += [f"Made with `oarsmith merge` {__version__}, seed {seed}, of", ""]
    lines += ["| model | tensors | SHA-256 of its tensors |", "| --- | --- | --- |"]
    lines += [f"| {one.reference} | {one.num_tensors} | {_hashes(one)} |" for one in report.inputs]
    lines += ["", "by this recipe:", "", "```yaml", recipe.rstrip(), "```", "", "## Verified", ""]
    lines += [f"- {report.num_tensors:,} tensors, {report.num_parameters:,} parameters, all numbers finite"]
    lines += [f"- read back after writing: names, shapes and hashes agree (together `{report.hash}`)"]
    for name, found in report.verified.answers.items():
        lines += [
            f"- probe tokens beside {name}: KL {found.kl:.3g} nats, same best token {found.top1:.0%}, "
            f"max abs logit difference {found.max_logit:.3g}"
        ]
    if table:
        lines += ["", "## Evaluated", "", *markdown_table(table)]
    return "\n".join(lines) + "\n"


def _hashes(one: Input) -> str:
    return f"`{one.hash}`" + ("" if one.adapter_hash is None else f", adapter `{one.adapter_hash}`")


def markdown_table(table: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, its header first."""
    head, *rows = table
    return [
        f"| {' | '.join(head)} |",
        f"| {' | '.join('---' for _ in head)} |",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
