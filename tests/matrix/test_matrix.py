"""Every cell of the support table, earned in this run; the committed table must say the same.

``make matrix`` (OARSMITH_WRITE_MATRIX=1) writes what this run found to docs/support.md, the README and the package.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from oarsmith.models import families
from oarsmith.models.families import support

from .bench import Bench
from .capabilities import NotApplicable
from .columns import COLUMNS
from .rows import ROWS
from .table import Measured, committed_documents, documents, to_support, write

WRITE = os.environ.get("OARSMITH_WRITE_MATRIX") == "1"
_measured = Measured({}, {})


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny matrices."""


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Bench]]:
    """One bench at a time: cells run row by row."""
    found: dict[str, Bench] = {}
    yield found
    for bench in found.values():
        shutil.rmtree(bench.folder)


@pytest.fixture
def bench(row: str, benches: dict[str, Bench], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    if row not in benches:
        for old in benches.values():
            shutil.rmtree(old.folder)
        benches.clear()
        benches[row] = Bench(row, ROWS[row], tmp_path_factory.mktemp("row"))
    return benches[row]


def test_every_family_has_a_row() -> None:
    rows = {families.find(row.config).name for row in ROWS.values()}
    assert rows == {family.name for family in families.known()}


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", ROWS)
def test_cell(row: str, column: str, bench: Bench) -> None:
    try:
        _measured.cells[row, column] = COLUMNS[column].run(bench)
    except NotApplicable as reason:
        _measured.gaps[row, column] = str(reason)


def test_the_table_says_what_was_measured() -> None:
    """Of the cells that ran; all of them in a run of the whole file."""
    everything = len(_measured.cells) + len(_measured.gaps) == len(ROWS) * len(COLUMNS)
    if WRITE:
        assert everything, "a table is written from a whole run without failures"
        write(_measured)
    stored = support.read()
    cells = {(row.name, column): value for row in stored.rows for column, value in row.cells.items()}
    fix = "run `make matrix` and look at the difference"
    assert {key: cells.get(key) for key in _measured.cells} == _measured.cells, fix
    assert not [key for key in _measured.gaps if key in cells], fix
    if everything:
        assert stored == to_support(_measured), fix


def test_documents_show_the_table() -> None:
    assert committed_documents() == documents(support.read()), "run `make matrix`"
