"""The compiled library at every level of instructions that this CPU has."""

from __future__ import annotations

import pytest

from native_matrices import Packer
from oarsmith.native.library import levels, load_level


@pytest.fixture(scope="session", params=levels())
def packer(request: pytest.FixtureRequest) -> Packer:
    return Packer(request.param, load_level(request.param))
