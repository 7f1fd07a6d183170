"""What ``test_triton_attention.py`` runs in a process of its own: the programs compiled for GPUs that are not here.

That says that they compile, and fit a processor's shared memory; not what they compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from oarsmith.kernels import Scores, triton_attention, triton_programs

# Compute capability -> shared memory in bytes that a program may have: A100, RTX 4090, H100.
MEMORY = {80: 166_912, 89: 101_376, 90: 232_448}


class Gpu:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """Stands for a program: compiles it for its arguments in place of running it."""

    def __init__(self, program: Any, found: list[Any]) -> None:
        self.program, self.found = program, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.found.append(self.program.warmup(*args, grid=grid, **kwargs))


class Case(NamedTuple):
    heads: int
    groups: int
    dim: int
    value_dim: int
    dtype: torch.dtype = torch.bfloat16
    rules: Mapping[str, Any] = MappingProxyType({})


CASES = {
    "Llama 3": Case(32, 8, 128, 128),
    "Gemma 2": Case(16, 8, 256, 256, rules={"window": 4096, "softcap": 50.0}),
    "gpt-oss": Case(64, 8, 64, 64, rules={"window": 128, "sinks_H": torch.zeros(64).bfloat16()}),
    "DeepSeek V3": Case(128, 1, 576, 512),
    "biases, fp32": Case(32, 32, 80, 80, torch.float32, {"bias_HP": torch.zeros(32, 5000)}),
    "fp16, 96": Case(32, 32, 96, 96, torch.float16),
}


@pytest.mark.parametrize("capability", MEMORY)
@pytest.mark.parametrize("name", CASES)
def test_compiles(name: str, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case, found = CASES[name], []
    monkeypatch.setattr(driver, "_active", Gpu(capability))
    monkeypatch.setattr(triton_attention, "_device", lambda _: (132, MEMORY[capability]))
    for program in ("attend", "finish"):
        monkeypatch.setattr(triton_programs, program, Compiled(getattr(triton_programs, program), found))
    triton_attention._groups.cache_clear()
    # A long prompt, and single tokens over a long cache.
    q = torch.empty(302, case.heads, case.dim, dtype=case.dtype)
    k = torch.empty(5000, case.groups, case.dim, dtype=case.dtype)
    v = k[..., : case.value_dim]
    spans = [(0, 300, 0, 400, 0), (300, 301, 400, 4000, 0), (301, 302, 4000, 4100, 0)]
    scores = Scores(0.1, **case.rules)
    assert triton_attention.covers(q, k, v, scores)
    triton_attention.attention(q, k, v, spans, scores, ((0, 4100, 7),))
    attends = [kernel for kernel in found if kernel.metadata.name == "attend"]
    assert len(attends) == 2
    for kernel in found:
        assert "cubin" in kernel.asm
        assert kernel.metadata.shared <= MEMORY[capability]
        if case.dtype != torch.float32 and kernel in attends:
            assert "mma" in kernel.asm["ptx"], "products by the tensor cores"
