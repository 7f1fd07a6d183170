"""Packed weights in a file: the same program and bytes, or an error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from matrix.bench import Bench
from matrix.rows import ROWS
from oarsmith.compiling import BuildError
from oarsmith.errors import CheckpointError
from oarsmith.native.library import load
from oarsmith.native.lower import lower
from oarsmith.native.packed import read_packed, write_packed

try:
    load()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.mark.parametrize("row", ["llama", "qwen2_moe", "chatglm", "yuan", "deepseek_v3", "phi3"])
@torch.no_grad()
def test_round_trip(row: str, tmp_path: Path) -> None:
    program, arena = lower(Bench(row, ROWS[row], tmp_path).model(), "int4")
    write_packed(tmp_path / "packed", program, arena)
    again, memory = read_packed(tmp_path / "packed")
    assert again == program
    assert memory.memory[: memory.size] == arena.memory[: arena.size]


def test_damage_is_noticed(tmp_path: Path) -> None:
    program, arena = lower(Bench("llama", ROWS["llama"], tmp_path).model(), "int8")
    path = tmp_path / "packed"
    write_packed(path, program, arena)
    whole = path.read_bytes()
    damages = [
        b"",
        whole[:20],
        whole[:3000],
        whole[:-1],
        whole + b"x",
        b"OARPACK0" + whole[8:],
        whole[:60] + b"?" + whole[61:],
    ]
    damages.append(whole[:8] + b"\xff" * 8 + whole[16:])
    for damaged in damages:
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            read_packed(path)


def test_reading_needs_no_pytorch(tmp_path: Path) -> None:
    program, arena = lower(Bench("llama", ROWS["llama"], tmp_path).model(), "int8")
    write_packed(tmp_path / "packed", program, arena)
    script = f"""
import sys
from pathlib import Path
from oarsmith.native.packed import read_packed
from oarsmith.native.step import Step
Step(*read_packed(Path({str(tmp_path / "packed")!r})), threads=1, num_pages=4, page_size=16, num_sequences=1)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
