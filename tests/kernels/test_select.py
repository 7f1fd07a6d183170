"""Which implementation runs: with and without a compiler, with a damaged cache, by choice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from oarsmith.compiling import cache_directory
from oarsmith.errors import ConfigError
from oarsmith.kernels import describe, rms_norm, rope, using
from oarsmith.kernels.norm import rms_norm_reference
from oarsmith.kernels.select import native_for

SRC = Path(__file__).parents[2] / "src"
PROBE = """
import torch
from oarsmith.errors import ConfigError
from oarsmith.kernels import describe, rms_norm, using
print(" ".join(describe().split()))
assert torch.equal(rms_norm(torch.ones(2, 4), torch.ones(4), 0.0), torch.ones(2, 4))
try:
    with using("native"):
        print("native")
except ConfigError as error:
    print("refused:", " ".join(str(error).split()))
print(" ".join(describe().split()))
"""


def probe(cache: Path, **environment: str) -> list[str]:
    """What a fresh process says."""
    settings = {**os.environ, "PYTHONPATH": str(SRC), "OARSMITH_CACHE": str(cache), **environment}
    done = subprocess.run([sys.executable, "-c", PROBE], env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_compiled_kernels_are_what_runs(native: None) -> None:
    assert describe() == "compiled C++ kernels on the CPU"
    for dtype in (torch.float32, torch.bfloat16):
        out = rms_norm(torch.ones(2, 3, dtype=dtype, requires_grad=True), torch.ones(3, dtype=dtype), 1e-5)
        assert out.grad_fn is not None and out.grad_fn.name() == "_RMSNormBackward"


def test_torch_by_choice(native: None) -> None:
    x, w = torch.randn(3, 5), torch.randn(5)
    with using("torch"):
        assert describe() == "PyTorch operations (as chosen)"
        assert native_for(x, w) is None
        assert torch.equal(rms_norm(x, w, 1e-5), rms_norm_reference(x, w, 1e-5))
    assert native_for(x, w) is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_take_the_twin(native: None, dtype: torch.dtype) -> None:
    x = torch.randn(3, 2, 6, dtype=dtype)
    assert native_for(x) is None
    assert rope(x, torch.ones(3, 3), torch.zeros(3, 3)).dtype == dtype
    assert native_for(torch.ones(2), torch.ones(2).bfloat16()) is None, "no kernel takes a mixture"


def test_without_a_compiler(tmp_path: Path) -> None:
    first, refused, last = probe(tmp_path, CXX=str(tmp_path / "no-such-compiler"))
    assert first == last and first.startswith("PyTorch operations: ") and "no-such-compiler" in first
    assert refused.startswith("refused: kernels=native:") and "no-such-compiler" in refused


def test_a_compiler_that_fails(tmp_path: Path) -> None:
    script = tmp_path / "broken compiler"
    script.write_text("#!/bin/sh\necho 'cannot find omp.h' >&2\nexit 1\n")
    script.chmod(0o755)
    first, refused, _ = probe(tmp_path / "cache", CXX=f"'{script}' -O1")
    assert first.startswith("PyTorch operations: ") and "cannot find omp.h" in first
    assert "cannot find omp.h" in refused


def test_a_cache_that_cannot_be_written(native: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    first, _, _ = probe(tmp_path / "file")
    assert first.startswith("PyTorch operations: the C++ kernels do not build")


@pytest.mark.slow
def test_a_damaged_library_is_built_again(native: None, tmp_path: Path) -> None:
    """The name is the hash of what it was built from, so the file this process uses tells the name."""
    names = {path.name for path in cache_directory().glob("kernels-*.so")}
    assert names
    for name in names:
        (tmp_path / name).write_bytes(b"\x7fELF half a library")
    first, native_line, _ = probe(tmp_path)
    assert first == "compiled C++ kernels on the CPU" and native_line == "native"
    assert any((tmp_path / name).stat().st_size > 1000 for name in names)
    assert not [path for path in tmp_path.iterdir() if path.name not in names], "nothing is left behind"


def test_a_library_without_our_functions(native: None, tmp_path: Path) -> None:
    """Another library under our name: the reason is given, and nothing crashes."""
    source, other = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text("int other(void) { return 1; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(other)], check=True)
    for path in cache_directory().glob("kernels-*.so"):
        (tmp_path / path.name).write_bytes(other.read_bytes())
    first, refused, _ = probe(tmp_path)
    assert first.startswith("PyTorch operations: the compiled C++ kernels are damaged")
    assert refused.startswith("refused:")


def test_the_choice_ends_with_its_block() -> None:
    before = describe()
    with pytest.raises(ZeroDivisionError), using("torch"):
        _ = 1 / 0
    assert describe() == before
    assert issubclass(ConfigError, ValueError)
