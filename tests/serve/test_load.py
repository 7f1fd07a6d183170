"""The load benchmark for a few seconds: what it looks for is not there, and it would see it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import environment

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve_load.py"


@pytest.mark.slow
def test_nothing_is_lost_mixed_up_or_leaked():
    words = [sys.executable, str(SCRIPT), "--minutes", str(10 / 60), "--clients", "16"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=180, env=environment(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| lost, mixed up or leaked | 0 |" in done.stdout
    assert "| answered |" in done.stdout and "| left |" in done.stdout


def test_growth_is_found(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("serve_load", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.growth([(float(t), 100 + t / 30) for t in range(120)]) == pytest.approx(2.0)
    assert module.growth([(float(t), 100.0) for t in range(120)]) == 0.0
