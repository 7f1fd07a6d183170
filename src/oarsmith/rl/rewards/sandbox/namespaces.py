"""A view of the machine with nothing in it: namespaces of users, processes, network and mounts, and a root of its own.

Standard library only: the sandbox's own process imports it. Manuals: namespaces(7), pivot_root(2), mount_setattr(2).
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path

_NEW_MOUNTS, _NEW_UTS, _NEW_IPC, _NEW_USER, _NEW_PIDS, _NEW_NET = (
    *(0x00020000, 0x04000000, 0x08000000),
    *(0x10000000, 0x20000000, 0x40000000),
)
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR = 442
_CAPSET = {"x86_64": 126, "aarch64": 91}
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24
_CAPABILITIES_V3 = 0x20080522
_SIGKILL = 9
NOBODY = 65534
_SYSTEM = ("/usr", "/bin", "/lib", "/lib64")
_DEVICES = ("null", "zero", "random", "urandom")

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def die_with_parent() -> None:
    """End this process when the one that started it ends."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0), "prctl(PDEATHSIG)")


def hide_memory() -> None:
    """Other processes of the same user cannot look into this one's memory."""
    _checked(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl(DUMPABLE)")


def leave_machine() -> None:
    """New namespaces for this process; those of processes are for what it starts.

    Raises:
        OSError: the kernel, a container or its policy does not allow it.
    """
    flags = _NEW_MOUNTS | _NEW_UTS | _NEW_IPC | _NEW_PIDS | _NEW_NET
    if os.geteuid() == 0:
        _checked(_libc.unshare(flags), "unshare(mount, pid, net, ipc)")
        return
    user, group = os.geteuid(), os.getegid()
    _checked(_libc.unshare(flags | _NEW_USER), "unshare(user, mount, pid, net, ipc)")
    own = os.open("/proc/self", os.O_DIRECTORY)
    _map_user(own, user, group)
    os.close(own)


def _map_user(own: int, user: int, group: int) -> None:
    """Write the maps of a new namespace, ``own`` being this process's directory in /proc."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        file = os.open(name, os.O_WRONLY, dir_fd=own)
        os.write(file, text.encode())
        os.close(file)


def enter_root(root: str, num_bytes: int, readable: tuple[str, ...]) -> None:
    """Make ``root`` (an empty directory) the root of this process, read-only, with the system's programs and libraries,
    Python, ``readable`` and a few devices; ``/tmp`` is empty, writable, and holds at most ``num_bytes``.

    Raises:
        OSError: a mount that is not allowed.
    """
    _mount(None, "/", None, _REC | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=1m,nr_inodes=4k,mode=755")
    shown: list[Path] = []
    for name in (*_SYSTEM, os.path.realpath(sys.base_prefix), *readable):
        path = Path(name)
        target = Path(root + name)
        if path.is_symlink() and name in _SYSTEM:
            target.symlink_to(os.readlink(path))
        elif path.is_dir() and not any(path == other or other in path.parents for other in shown):
            target.mkdir(parents=True, exist_ok=True)
            _show(name, str(target))
            shown.append(path)
    Path(root, "dev").mkdir()
    for device in _DEVICES:
        Path(root, "dev", device).touch()
        _mount(f"/dev/{device}", f"{root}/dev/{device}", None, _BIND)
    Path(root, "tmp").mkdir()
    _mount("tmpfs", f"{root}/tmp", "tmpfs", _NOSUID | _NODEV, f"size={num_bytes},nr_inodes=16k,mode=1777")
    _mount(None, root, None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    os.chdir(root)
    _checked(_libc.syscall(_PIVOT_ROOT[platform.machine()], b".", b"."), "pivot_root")
    _checked(_libc.umount2(b".", _DETACH), "umount")
    os.chdir("/tmp")


def _show(source: str, target: str) -> None:
    """A directory with all that is mounted in it, read-only."""
    _mount(source, target, None, _BIND | _REC)
    # struct mount_attr: attr_set RDONLY | NOSUID | NODEV, attr_clr, propagation, userns_fd
    attributes = (ctypes.c_uint64 * 4)(1 | 2 | 4, 0, 0, 0)
    arguments = (_AT_FDCWD, target.encode(), _AT_RECURSIVE, ctypes.byref(attributes), ctypes.sizeof(attributes))
    _checked(_libc.syscall(_MOUNT_SETATTR, *arguments), f"mount_setattr({source})")


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind, data)]
    result = _libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3])
    _checked(result, f"mount({target})")


def open_own() -> int:
    """This process's directory in /proc, for after the root has changed."""
    return os.open("/proc/self", os.O_DIRECTORY)


def become_nobody(own: int) -> None:
    """Give up every right: root becomes nobody, in a namespace of users of its own where that is allowed (so that its
    processes are counted for themselves), and all capabilities go.

    Args:
        own: of `open_own`; closed.

    Raises:
        OSError: a right that could not be given up.
    """
    if os.geteuid() == 0:
        for number in range(64):
            if _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0) != 0:
                break  # past the last one that this kernel knows
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        _checked(_libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl(DUMPABLE)")  # else the maps belong to root
        # Without it the limit of processes holds too, but counts those of all programs that run at the time.
        if _libc.unshare(_NEW_USER) == 0:
            _map_user(own, NOBODY, NOBODY)
    os.close(own)
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_V3, 0)
    none = (ctypes.c_uint32 * 6)()
    _checked(_libc.syscall(_CAPSET[platform.machine()], ctypes.byref(header), ctypes.byref(none)), "capset")
