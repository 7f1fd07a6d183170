"""The command line answers at once."""

import os
import subprocess
import sys
from pathlib import Path

import oarsmith

ROOT = str(Path(oarsmith.__file__).parents[1])
MAX_CPU_SECONDS = 0.3
CODE = """
import sys, time
from oarsmith.cli import main
assert main(sys.argv[1:]) == 0
heavy = sorted({"torch", "pydantic", "numpy", "yaml", "rich"} & set(sys.modules))
print(time.process_time(), *heavy, file=sys.stderr)
"""


def cpu_seconds(*words: str) -> tuple[float, list[str]]:
    """CPU time of a whole process, interpreter start included: the best of three."""
    best, heavy = float("inf"), [""]
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", CODE, *words],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": ROOT},
        )
        seconds, *heavy = done.stderr.split()
        best = min(best, float(seconds))
    return best, heavy


def test_overview():
    seconds, heavy = cpu_seconds("--help")
    assert heavy == []
    assert seconds < MAX_CPU_SECONDS


def test_preprocess_needs_no_torch():
    code = "import oarsmith.jobs.preprocess, sys; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": ROOT}, check=False).returncode
        == 0
    )


def test_help_of_a_command_imports_no_torch():
    _, heavy = cpu_seconds("sft", "--help")
    assert heavy == ["pydantic"]
