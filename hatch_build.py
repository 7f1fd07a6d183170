"""Puts compiled libraries of the native step into a wheel, so that it runs where there is no compiler.

    OARSMITH_PREBUILD=all python -m build --wheel

Without the variable nothing is compiled and the wheel is for every platform. Instead of ``all`` it may name levels
(``oarsmith.native.library``), with commas between them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags


class PrebuiltStep(BuildHookInterface):
    """Compiles the levels that ``$OARSMITH_PREBUILD`` names."""

    PLUGIN_NAME = "custom"
    _compiled: Sequence[Path] = ()

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Before the wheel is put together; in an editable one libraries are compiled on first use."""
        wanted = os.environ.get("OARSMITH_PREBUILD", "")
        if not wanted or version == "editable":
            return
        sys.path.insert(0, str(Path(self.root) / "src"))
        from oarsmith.native.library import portable_levels, prebuild

        names = portable_levels() if wanted == "all" else wanted.split(",")
        self._compiled = prebuild(names)
        build_data["pure_python"] = False
        # They are called through ctypes: any Python 3, but this platform and its C library or later.
        build_data["tag"] = f"py3-none-{next(sys_tags()).platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """What was compiled for the wheel does not stay in the checkout."""
        for path in self._compiled:
            path.unlink()
