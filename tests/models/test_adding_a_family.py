"""The worked example of docs/adding-a-family.md is a family file of this version, whole and short."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adding-a-family.md"


def test_the_example_is_the_file() -> None:
    code = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)[0]
    assert code == (ROOT / "src" / "oarsmith" / "models" / "families" / "gpt_neox.py").read_text(encoding="utf-8")
    assert len(code.splitlines()) < 80
