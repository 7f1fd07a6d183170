"""Bounds of every test here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fuzz.damage import limits


@pytest.fixture(scope="module", autouse=True)
def _limits() -> Iterator[None]:
    with limits():
        yield
