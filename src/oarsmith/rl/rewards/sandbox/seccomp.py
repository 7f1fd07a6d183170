"""System calls that a sandboxed program does not get, as a filter in the kernel (seccomp, without libraries).

Standard library only: the sandbox's own process imports it. Numbers are those of Linux's tables
(``arch/x86/entry/syscalls/syscall_64.tbl``, ``include/uapi/asm-generic/unistd.h``).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# On other processes' memory, mounts, namespaces, kernel keys and modules, the clock, and on ways around this filter.
_DENIED = {
    "x86_64": (
        *(41, 101, 103, 155, 161, 163, 164, 165, 166, 167, 168, 169, 172, 173, 175, 176, 179, 227, 246, 248, 249, 250),
        *(272, 298, 303, 304, 308, 310, 311, 313, 320, 321, 323, 425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 442),
    ),
    "aarch64": (
        *(198, 117, 116, 41, 51, 89, 170, 40, 39, 224, 225, 142, 105, 106, 60, 112, 104, 217, 218, 219),
        *(97, 241, 264, 265, 268, 270, 271, 273, 294, 280, 282, 425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 442),
    ),
}
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_NEW_NAMESPACES = 0x7E020080  # every CLONE_NEW... flag
_X32 = 0x40000000

_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
_NR, _ARCH, _ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _MODE_FILTER = 22, 38, 2


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def filter_of(machine: str, denied: tuple[int, ...] | None = None) -> bytes:
    """The filter as classic BPF: a call in ``denied`` (by default the list above) fails with EPERM.

    Raises:
        OSError: no numbers for this machine are known.
    """
    if machine not in _AUDIT_ARCH:
        raise OSError(errno.ENOSYS, f"no list of system calls for {machine}")
    refuse = _ERROR | errno.EPERM
    code = [_step(_LOAD, _ARCH), _step(_JUMP_EQUAL, _AUDIT_ARCH[machine], 1, 0), _step(_RETURN, refuse)]
    code.append(_step(_LOAD, _NR))
    if machine == "x86_64":
        code += [_step(_JUMP_AT_LEAST, _X32, 0, 1), _step(_RETURN, refuse)]
    for number in _DENIED[machine] if denied is None else denied:
        code += [_step(_JUMP_EQUAL, number, 0, 1), _step(_RETURN, refuse)]
    if denied is None:
        # The C library goes on with clone, whose flags can be seen.
        code += [_step(_JUMP_EQUAL, _CLONE3, 0, 1), _step(_RETURN, _ERROR | errno.ENOSYS)]
        code += [_step(_JUMP_EQUAL, _CLONE[machine], 0, 3), _step(_LOAD, _ARGUMENT)]
        code += [_step(_JUMP_SET, _NEW_NAMESPACES, 0, 1), _step(_RETURN, refuse)]
    return b"".join([*code, _step(_RETURN, _ALLOW)])


def install(denied: tuple[int, ...] | None = None) -> None:
    """Put the filter on this process and all it will start; it cannot be taken away.

    Raises:
        OSError: the kernel does not take it.
    """
    code = filter_of(platform.machine(), denied)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0),
    ):
        if libc.prctl(*arguments) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"seccomp: {os.strerror(number)}")


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
