"""``oarsmith models``: the table the package carries."""

from __future__ import annotations

import pytest

from oarsmith import cli
from oarsmith.models import families
from oarsmith.models.families import support


def test_every_family_and_every_gap_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    printed, table = capsys.readouterr().out, support.read()
    lines = printed.splitlines()
    assert {row.family for row in table.rows} == {family.name for family in families.known()}
    for row in table.rows:
        (line,) = [line for line in lines if line.startswith(f"{row.name}  ")]
        assert f" {row.model_type} " in line and row.models in line
        titles = [column.title.strip("`") for column in table.columns if column.key in row.gaps]
        assert line.endswith(", ".join(titles) or "-")
    for column in table.columns:
        assert f"  {column.title.strip('`')} " in printed and column.meaning in printed
    assert all(reason in printed for row in table.rows for reason in row.gaps.values())
