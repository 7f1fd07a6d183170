"""Memory that is free. No PyTorch here."""

from __future__ import annotations

from pathlib import Path

_MEMORY = Path("/proc/meminfo")
# What a system is taken to have free that does not tell.
_UNKNOWN = 4 << 30


def free_memory() -> int:
    """Bytes of main memory that can still be allocated."""
    if not _MEMORY.exists():
        return _UNKNOWN
    fields = dict(line.split(":", 1) for line in _MEMORY.read_text(encoding="ascii").splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024
