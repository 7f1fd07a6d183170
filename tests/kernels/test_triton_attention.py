"""The Triton kernel: what it computes, that it compiles for GPUs, and when it is chosen.

Without a GPU Triton's interpreter runs it on the CPU. Whether it does is settled when Triton is imported, so that is
done in processes of their own.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from oarsmith.kernels import Scores, attention, select, using
from oarsmith.kernels.attention import attention_reference

from .conftest import randn

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run_cases(file: str, cache: Path, *words: str, interpreted: bool) -> None:
    settings = {"TRITON_INTERPRET": str(int(interpreted)), "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words, str(HERE / file)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
def test_rules(tmp_path: Path) -> None:
    words = ("-k", "test_rules and whole or test_prefixes and plain or test_tables")
    run_cases("triton_attention_cases.py", tmp_path, *words, interpreted=not torch.cuda.is_available())


@needs_triton
@pytest.mark.slow
def test_all_cases(tmp_path: Path) -> None:
    run_cases("triton_attention_cases.py", tmp_path, interpreted=not torch.cuda.is_available())


@needs_triton
@pytest.mark.slow
def test_compiles_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    run_cases("triton_compile_cases.py", tmp_path, interpreted=False)


def test_never_on_a_cpu() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert select.triton_for(*(randn(2, 1, 4, dtype=dtype) for _ in range(3))) is None


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors count as a GPU's."""
    monkeypatch.setattr(select, "_on_gpu", lambda _: True)
    select._triton_attention.cache_clear()
    yield
    select._triton_attention.cache_clear()


@needs_triton
def test_what_it_is_chosen_for(pretended_gpu: None) -> None:
    from oarsmith.kernels import triton_attention

    q, k, v = (randn(3, 1, 4, seed=seed) for seed in range(3))
    assert select.triton_for(q, k, v) is triton_attention
    assert select.triton_for(q, k.bfloat16(), v) is None, "a mixture"
    assert select.triton_for(q.double(), k.double(), v.double()) is None
    assert select.triton_for(q.requires_grad_(), k, v) is None, "it has no backward pass"
    with torch.no_grad():
        assert select.triton_for(q, k, v) is triton_attention
    with using("torch"):
        assert select.triton_for(k, k, v) is None


@needs_triton
@torch.no_grad()
def test_what_is_not_covered_runs_in_plain_pytorch(pretended_gpu: None, caplog: pytest.LogCaptureFixture) -> None:
    from oarsmith.kernels import triton_attention

    triton_attention._say.cache_clear()
    q, k, v = (randn(4, 1, 6, seed=seed).transpose(0, 2) for seed in range(3))
    spans, scores = [(0, 6, 0, 6, 0)], Scores(0.5)
    with caplog.at_level(logging.WARNING):
        found = [attention(q, k, v, spans, scores) for _ in range(3)]
    torch.testing.assert_close(found[0], attention_reference(q, k, v, spans, scores))
    (line,) = caplog.messages
    assert "plain PyTorch" in line and "side by side" in line
    sizes = triton_attention.Sizes(1, 4096, 4096, 4)
    assert triton_attention.tile_for(sizes, 1, 101_376) is None, "too large for a processor's shared memory"


def test_without_triton(pretended_gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("triton", "oarsmith.kernels.triton_attention", "oarsmith.kernels.triton_programs"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("oarsmith.kernels.triton_attention", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    q, k, v = (randn(3, 1, 4, seed=seed) for seed in range(3))
    spans, scores = [(0, 3, 0, 3, 0)], Scores(0.5)
    with caplog.at_level(logging.WARNING):
        found = [attention(q, k, v, spans, scores) for _ in range(3)]
    torch.testing.assert_close(found[0], attention_reference(q, k, v, spans, scores))
    (line,) = caplog.messages
    assert "plain PyTorch" in line and "triton" in line


@needs_triton
def test_how_keys_are_split() -> None:
    from oarsmith.kernels.triton_attention import num_splits

    assert num_splits(8, 100, None, 132) == 1, "too few keys"
    assert num_splits(8, 100_000, None, 132) == 33, "two programs for each processor"
    assert num_splits(8, 2048, None, 132) == 8, "256 keys each"
    assert num_splits(1, 10**6, None, 132) == 64
    assert num_splits(8, 100_000, 1024, 132) == 4, "a window hides the rest"
    assert num_splits(1000, 100_000, None, 132) == 1, "enough programs without"
