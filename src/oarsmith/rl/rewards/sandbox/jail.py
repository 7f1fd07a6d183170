"""The sandbox's own process: gives up the machine, then runs a program case by case and says what became of each.

Standard library only, so that it starts in milliseconds. Started by ``sandbox.py`` with a request on its standard
input; writes outcomes to its standard output. The program never has either.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from typing import Any

from oarsmith.rl.rewards.sandbox import namespaces, seccomp

_PIECE = 1 << 16
_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}


def main() -> None:
    """The process."""
    request = json.load(sys.stdin)
    if request["hold"] is not None:
        seccomp.install(tuple(request["hold"]))  # tests: what a kernel refuses
    namespaces.die_with_parent()
    if request["weaker"]:
        _weaker(request)
        return
    try:
        namespaces.leave_machine()
    except OSError as error:
        _refuse(f"namespaces are not allowed here ({error.strerror})")
    namespaces.die_with_parent()  # whoever changes its rights has to say so again
    child = os.fork()
    if child == 0:
        namespaces.die_with_parent()
        try:
            own = namespaces.open_own()
            namespaces.enter_root(request["root"], request["limits"]["files"], tuple(request["readable"]))
            namespaces.become_nobody(own)
            namespaces.die_with_parent()
            namespaces.hide_memory()
            seccomp.install()
        except OSError as error:
            _refuse(f"a sandbox cannot be made here ({error.strerror})")
        _run_cases(request, alone=True)
        os._exit(0)
    os.waitpid(child, 0)


def _weaker(request: dict[str, Any]) -> None:
    """Limits and a filter of system calls only: as asked for, where there is no more."""
    os.chdir(request["root"])
    try:
        if os.geteuid() == 0:
            os.chown(request["root"], namespaces.NOBODY, namespaces.NOBODY)
        namespaces.become_nobody(namespaces.open_own())
        namespaces.die_with_parent()
        namespaces.hide_memory()
        seccomp.install()
    except OSError as error:
        _refuse(f"not even a weaker sandbox can be made here ({error.strerror})")
    _run_cases(request, alone=False)


def _refuse(why: str) -> None:
    print(json.dumps({"refused": why}), flush=True)
    os._exit(1)


def _run_cases(request: dict[str, Any], *, alone: bool) -> None:
    """Every case, an outcome a line.

    Args:
        alone: this is the first process of its namespace, and all others belong to the program.
    """
    os.environ.clear()
    os.environ.update(_ENVIRONMENT)
    home = os.getcwd()
    for number, case in enumerate(request["cases"]):
        place = f"{home}/{number}"
        os.mkdir(place)
        os.chdir(place)
        print(json.dumps(_run_case(request, case, alone=alone)), flush=True)
        os.chdir(home)


def _run_case(request: dict[str, Any], case: dict[str, Any], *, alone: bool) -> dict[str, Any]:
    given = os.memfd_create("stdin")
    os.write(given, case["stdin"].encode("utf-8", "replace"))
    os.lseek(given, 0, os.SEEK_SET)
    pipes = {name: os.pipe() for name in ("stdout", "stderr", "report", "tests")}
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _become_program(request, given, pipes)
    os.close(given)
    for name, (reading, writing) in pipes.items():
        os.close(reading if name == "tests" else writing)
    with contextlib.suppress(BrokenPipeError):
        _write_all(pipes["tests"][1], case["tests"].encode("utf-8", "replace"), began + request["limits"]["seconds"])
    os.close(pipes["tests"][1])
    ends = {name: pipes[name][0] for name in ("stdout", "stderr", "report")}
    limit, status, read = _follow(child, ends, request["limits"], began)
    _end(child, status, alone=alone)
    for end in ends.values():
        os.close(end)
    texts = {name: data.decode("utf-8", "replace") for name, data in read.items()}
    return {
        "limit": limit,
        "exit": os.WEXITSTATUS(status) if limit is None and status is not None and os.WIFEXITED(status) else None,
        "signal": os.WTERMSIG(status) if status is not None and os.WIFSIGNALED(status) else None,
        "seconds": time.monotonic() - began,
        **texts,
    }


def _write_all(end: int, data: bytes, until: float) -> None:
    """All of it, unless nobody reads until then."""
    os.set_blocking(end, False)
    while data and time.monotonic() < until:
        _, ready, _ = select.select([], [end], [], max(0.0, until - time.monotonic()))
        if ready:
            data = data[os.write(end, data[:4096]) :]


def _follow(
    child: int, ends: dict[str, int], limits: dict[str, Any], began: float
) -> tuple[str | None, int | None, dict[str, bytes]]:
    """Read what it writes until it ends or passes a limit."""
    read = dict.fromkeys(ends, b"")
    names = {end: name for name, end in ends.items()}
    opened = set(ends.values())
    for end in opened:
        os.set_blocking(end, False)
    status: int | None = None
    while True:
        if status is None:
            pid, found = os.waitpid(child, os.WNOHANG)
            status = found if pid else None
        # What is in the pipes is read once more after the end; what others hold open is not waited for.
        ready = select.select(list(opened), [], [], 0.005 if status is None else 0)[0] if opened else []
        if not opened and status is None:
            time.sleep(0.002)
        for end in ready:
            piece = _read(end)
            read[names[end]] += piece
            if not piece:
                opened.discard(end)
            if len(read[names[end]]) > limits["output"]:
                return (
                    "output",
                    status if pid else None,
                    {name: data[: limits["output"]] for name, data in read.items()},
                )
        if status is not None and not ready:
            return None, status, read
        if time.monotonic() - began > limits["seconds"]:
            return "time", status, read


def _read(end: int) -> bytes:
    try:
        return os.read(end, _PIECE)
    except BlockingIOError:
        return b""


def _end(child: int, status: int | None, *, alone: bool) -> None:
    """Nothing of the program runs on."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if alone:
            os.kill(-1, signal.SIGKILL)
        else:
            os.killpg(child, signal.SIGKILL)
    if status is None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)
    with contextlib.suppress(ChildProcessError):
        while alone:
            os.waitpid(-1, 0)


def _become_program(request: dict[str, Any], given: int, pipes: dict[str, tuple[int, int]]) -> None:
    """In the new process: limits, no files but its own, then the program."""
    os.setsid()
    for source, target in ((given, 0), (pipes["stdout"][1], 1), (pipes["stderr"][1], 2)):
        os.dup2(source, target)
    report, tests = os.dup(pipes["report"][1]), os.dup(pipes["tests"][0])
    keep = sorted({report, tests})
    os.closerange(3, keep[0])
    os.closerange(keep[0] + 1, keep[1])
    os.closerange(keep[1] + 1, 4096)
    limits = request["limits"]
    for kind, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, int(limits["seconds"]) + 1),
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_FSIZE, limits["files"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, limits["processes"]),
    ):
        resource.setrlimit(kind, (value, value))
    code = 1
    try:
        code = _program(request["program"], report, tests)
    except BaseException:
        traceback.print_exc(limit=-3)
        raise
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class _Told:
    """What goes wrong within it is printed, and nothing more."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is not None:
            traceback.print_exception(error, limit=-2)
        return True


def _program(text: str, report: int, tests: int) -> int:
    """Run the program as ``__main__``, then the tests in its names; tests come over the pipe only after it has run."""
    for end, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        setattr(sys, name, os.fdopen(end, mode, closefd=False))
    sys.argv = ["program.py"]
    sys.path[:] = [path for path in sys.path if path.startswith(sys.base_prefix)]
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    try:
        exec(compile(text, "program.py", "exec"), module.__dict__)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    with open(tests, encoding="utf-8") as file:
        words = file.read()
    if not words:
        return 0
    asked = json.loads(words)
    passed: list[bool] = []
    for test in asked["tests"]:
        passed.append(False)
        with _Told():
            exec(compile(test, "test.py", "exec"), module.__dict__)
            passed[-1] = True
    os.write(report, json.dumps({"token": asked["token"], "passed": passed}).encode())
    return 0
