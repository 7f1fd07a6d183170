"""Tokenizer directories of fixtures/tokenizers/remote, and what their authors' code makes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parent / "fixtures" / "tokenizers"
CASES: dict[str, Any] = json.loads((FIXTURES / "remote" / "expected.json").read_text("utf-8"))["cases"]


def directory(name: str, path: Path) -> Path:
    """Write the files of a case into an existing directory."""
    case = CASES[name]
    for file, source in case["model"].items():
        shutil.copy(FIXTURES / source, path / file)
    for file, content in case["files"].items():
        (path / file).write_text(json.dumps(content))
    return path
