"""The compiled library at every level of instructions that this CPU has."""

from __future__ import annotations

import pytest

from native_matrices import Packer
from oarsmith.native.library import levels, load_level

# Between others in what they do, and compiled for these tests only.
BETWEEN = {"avx512", "avx2vnni"} - {levels()[0]}


@pytest.fixture(
    scope="session",
    params=[pytest.param(level, marks=[pytest.mark.slow] if level in BETWEEN else []) for level in levels()],
)
def packer(request: pytest.FixtureRequest) -> Packer:
    return Packer(request.param, load_level(request.param))
