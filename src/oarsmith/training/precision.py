"""Number formats: what a device can do, and the choice made from it."""

from __future__ import annotations

from pathlib import Path

import torch

from oarsmith.errors import ConfigError

# CPU flags with which bf16 matrix products run in hardware (x86: AVX512_BF16, AMX; Arm: BF16).
_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "avx_ne_convert", " bf16")


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 products run in hardware there."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and cpu_has_bf16(cpuinfo.read_text(encoding="utf-8", errors="replace"))


def cpu_has_bf16(cpuinfo: str) -> bool:
    """Whether the CPU that ``/proc/cpuinfo`` describes has bf16 instructions."""
    flags = next((line for line in cpuinfo.splitlines() if line.startswith(("flags", "Features"))), "")
    return any(flag in flags for flag in _BF16_FLAGS)


def training_dtype(name: str, *, fast_bf16: bool) -> torch.dtype:
    """The dtype weights are trained in: ``auto`` is bf16 where the hardware has it (``fast_bf16``), else fp32.

    bf16 and fp16 weights keep exact fp32 masters (see ``training/optimizers``), so nothing is lost between updates.
    fp16 needs a loss scaler (``training/scaler.py``); on a CPU it is slow.

    Raises:
        ConfigError: bf16 asked for on a CPU that would have to emulate it, or a dtype that cannot be trained.
    """
    if name == "auto":
        return torch.bfloat16 if fast_bf16 else torch.float32
    if name == "bf16":
        if not fast_bf16:
            raise ConfigError(
                "this CPU has no bf16 instructions, so bf16 training would be many times slower than fp32",
                where="dtype bf16",
                fix="set dtype to fp32 (or auto)",
            )
        return torch.bfloat16
    if name in ("fp32", "fp16"):
        return torch.float32 if name == "fp32" else torch.float16
    raise ConfigError(f"training in {name!r} is not possible", where="dtype", fix="use auto, bf16, fp32 or fp16")
