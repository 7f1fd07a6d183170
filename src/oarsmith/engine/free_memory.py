"""Memory that is free, in the machine and in the container around the process. No PyTorch here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# What a system is taken to have free that does not tell.
_UNKNOWN = 4 << 30
# Where a control group's files lie, and what they are called: its limit, what is used, and what of that is a cache of
# files that the kernel drops when it is needed. The second version, beside the first one too; then the first.
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_PLACES = (
    ("", "sys/fs/cgroup", _VERSION_2),
    ("", "sys/fs/cgroup/unified", _VERSION_2),
    ("memory", "sys/fs/cgroup/memory", _VERSION_1),
)


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that can still be allocated.

    Args:
        root: of the file system.
    """
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():
        return _UNKNOWN
    fields = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
    return min([int(fields["MemAvailable"].split()[0]) * 1024, *_left(root)])


def _left(root: Path) -> Iterator[int]:
    """What the process' control group, and each that it lies in, allows besides what is used."""
    for controllers, name in _groups(root):
        for controller, place, files in _PLACES:
            if controller not in controllers:
                continue
            # In a container its own group may be mounted as the root: names further down do not exist there.
            for part in (name, *Path(name).parents):
                left = _left_in(root / place / str(part).lstrip("/"), *files)
                if left is not None:
                    yield left


def _groups(root: Path) -> Iterator[tuple[list[str], str]]:
    """The process' control groups: which controllers, and the path."""
    text = _text(root / "proc/self/cgroup") or ""
    for line in text.splitlines():
        _, controllers, name = line.split(":", 2)
        yield controllers.split(","), name


def _left_in(folder: Path, limit: str, used: str, cached: str) -> int | None:
    most, now = _text(folder / limit), _text(folder / used)
    if most is None or now is None or not most.strip().isdigit():
        return None
    counts = dict(line.split() for line in (_text(folder / "memory.stat") or "").splitlines())
    return max(int(most) - int(now) + int(counts.get(cached, 0)), 0)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None
