"""The training dtype, on CPUs with and without bf16."""

import pytest
import torch

from oarsmith.errors import ConfigError
from oarsmith.training.precision import cpu_has_bf16, training_dtype


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu sse avx2 avx512f avx512_bf16 avx512_vnni\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("flags\t\t: fpu sse avx2 avx512f\n", False),
        ("Features\t: fp asimd\n", False),
        ("model name\t: avx512_bf16 in a name only\nflags\t: avx2\n", False),
        ("", False),
    ],
)
def test_cpu_flags(cpuinfo, expected):
    assert cpu_has_bf16(cpuinfo) is expected


def test_auto_follows_the_hardware():
    assert training_dtype("auto", fast_bf16=True) == torch.bfloat16
    assert training_dtype("auto", fast_bf16=False) == torch.float32
    assert training_dtype("fp32", fast_bf16=True) == torch.float32


def test_bf16_without_instructions_is_refused():
    with pytest.raises(ConfigError, match="no bf16 instructions") as caught:
        training_dtype("bf16", fast_bf16=False)
    assert caught.value.fix == "set dtype to fp32 (or auto)"


def test_fp16_by_choice_only():
    assert training_dtype("fp16", fast_bf16=False) == torch.float16
    with pytest.raises(ConfigError, match="'int8'"):
        training_dtype("int8", fast_bf16=True)
