"""How much memory is free: the machine's, within what control groups allow."""

from __future__ import annotations

from pathlib import Path

import pytest

from oarsmith.engine.free_memory import free_memory

GIB = 1 << 30
Files = dict[str, dict[str, object]]


def system(root: Path, groups: str, files: Files) -> Path:
    """A file system with 64 GiB free."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: {99 << 20} kB\nMemAvailable:   {64 << 20} kB\n")
    (root / "proc/self/cgroup").write_text(groups)
    for folder, contents in files.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (root / folder / name).write_text(f"{content}\n")
    return root


def second(limit: object, used: float, cached: float = 0) -> dict[str, object]:
    stat = f"anon 5\ninactive_file {int(cached * GIB)}\nactive_file 7"
    return {"memory.max": limit, "memory.current": int(used * GIB), "memory.stat": stat}


def first(limit: object, used: float, cached: float = 0) -> dict[str, object]:
    stat = f"inactive_file 1\ntotal_inactive_file {int(cached * GIB)}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": int(used * GIB), "memory.stat": stat}


V1 = "9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/docker/abc\n"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("", {}, 64),
        ("0::/\n", {"sys/fs/cgroup": second("max", 3)}, 64),
        ("0::/\n", {"sys/fs/cgroup": second(8 * GIB, 3, cached=1)}, 6),
        ("0::/\n", {"sys/fs/cgroup": second(2 * GIB, 3)}, 0),
        # The group above has less left.
        ("0::/a/b\n", {"sys/fs/cgroup/a/b": second(9 * GIB, 1), "sys/fs/cgroup/a": second(9 * GIB, 4)}, 5),
        # The name is that of outside; inside its group is the root.
        ("0::/system.slice/x\n", {"sys/fs/cgroup": second(4 * GIB, 1)}, 3),
        (V1, {"sys/fs/cgroup/memory/docker/abc": first(7 * GIB, 2, cached=0.5)}, 5.5),
        (V1, {"sys/fs/cgroup/memory": first(3 * GIB, 2)}, 1),
        (V1, {"sys/fs/cgroup/memory": first(9223372036854771712, 2)}, 64),
        (V1, {"sys/fs/cgroup/unified/docker/abc": second(5 * GIB, 1), "sys/fs/cgroup/memory": first(9 * GIB, 1)}, 4),
    ],
)
def test_limits_of_containers(
    tmp_path: Path, groups: str, files: dict[str, dict[str, object]], expected: float
) -> None:
    assert free_memory(system(tmp_path, groups, files)) == expected * GIB


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    assert free_memory(tmp_path) == 4 * GIB


def test_this_machine() -> None:
    assert 0 < free_memory() < 1 << 50
