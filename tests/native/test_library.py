"""Which library is loaded, and what loading it imports."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import oarsmith
from oarsmith.errors import OarsmithError
from oarsmith.native import library


def test_levels_are_of_this_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the best down; a CPU with less has fewer, and one that is no x86 has what its compiler finds."""
    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    old = "flags : fpu cx16 popcnt ssse3 sse4_1 sse4_2"
    monkeypatch.setattr(library, "cpu_flags", lambda: old)
    assert library.levels() == ["x86-64-v2"]
    zen2 = f"{old} avx2 fma f16c bmi1 bmi2 movbe abm"
    monkeypatch.setattr(library, "cpu_flags", lambda: zen2)
    assert library.levels() == ["x86-64-v3", "x86-64-v2"]
    zen4 = f"{zen2} avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni avx512_bf16"
    monkeypatch.setattr(library, "cpu_flags", lambda: zen4)
    assert library.levels()[0] == "avx512bf16"
    monkeypatch.setattr(library, "cpu_flags", lambda: f"{zen4} amx_tile amx_int8 amx_bf16")
    assert library.levels()[0] == "amx"
    monkeypatch.setattr(library.platform, "machine", lambda: "aarch64")
    assert library.levels() == ["native"]


def test_the_level_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OARSMITH_ISA", raising=False)
    assert library.level() == library.levels()[0]
    monkeypatch.setenv("OARSMITH_ISA", library.levels()[-1])
    assert library.level() == library.levels()[-1]
    monkeypatch.setenv("OARSMITH_ISA", "sse")
    with pytest.raises(OarsmithError, match="cannot run 'sse'"):
        library.level()


def test_a_library_built_before_needs_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "PREBUILT", tmp_path / "lib")
    name = library.levels()[-1]
    (path,) = library.prebuild([name])
    assert path.parent == tmp_path / "lib" and path.stat().st_size > 10000
    monkeypatch.setenv("CXX", "/no/compiler")
    library.load_level.cache_clear()
    try:
        loaded = library.load_level(name)
        assert loaded._name == str(path)
        loaded.native_block_bytes.restype = ctypes.c_int64
        assert loaded.native_block_bytes(1, ctypes.c_int64(64)) == 64 * 16 * 2
    finally:
        library.load_level.cache_clear()


@pytest.mark.slow
def test_a_wheel_with_libraries(tmp_path: Path) -> None:
    """Not for another platform any more, and the checkout is as before."""
    root, before = Path(__file__).parents[2], set(library.PREBUILT.glob("*"))
    if not library.portable_levels():
        pytest.skip("this processor's libraries are for the CPU at hand")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    name = library.levels()[-1]
    subprocess.run(command, cwd=root, env={**os.environ, "OARSMITH_PREBUILD": name}, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("oarsmith-") and "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as content:
        libraries = [path for path in content.namelist() if path.endswith(".so")]
    assert len(libraries) == 1 and libraries[0].startswith(f"oarsmith/native/lib/native-{name}-")
    assert set(library.PREBUILT.glob("*")) == before


def test_loading_imports_neither_torch_nor_numpy() -> None:
    code = """
import sys
from oarsmith.native.library import load
load()
heavy = sorted({"torch", "numpy", "pydantic", "subprocess", "tempfile"} & set(sys.modules))
sys.exit(" ".join(heavy) or 0)
"""
    library.load()  # so that it is in the cache
    environment = {**os.environ, "PYTHONPATH": str(Path(oarsmith.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
