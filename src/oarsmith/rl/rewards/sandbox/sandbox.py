"""Running a program that a model wrote: limits, outcomes, and the refusal where it could do harm."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from oarsmith.errors import ConfigError
from oarsmith.rl.rewards.values import RewardError

_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from oarsmith.rl.rewards.sandbox.jail import main; main()"
_SOURCE = str(Path(__file__).parents[4])
_MIB = 1 << 20
# Start, mounts and the end of processes, on a busy machine.
_SLACK_SECONDS = 20.0


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: of wall time, for each case; CPU seconds of each process are bounded by one more.
        memory: bytes of address space, of each process.
        files: bytes that all its files have together, and that one may have.
        output: bytes that it may print.
        processes: processes and threads at a time.
    """

    seconds: float = 5.0
    memory: int = 512 * _MIB
    files: int = 16 * _MIB
    output: int = _MIB
    processes: int = 8


@dataclass(frozen=True)
class Case:
    """One run of the program: what it reads, and the tests (Python statements) that run in its names afterwards."""

    stdin: str = ""
    tests: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        limit: the limit that ended it.
        exit: its status; None: a signal or a limit ended it.
        signal: that signal.
        stdout, stderr: what it printed, cut at the limit.
        passed: of each test whether it passed; () if the program did not come to the end of them.
        seconds: wall time.
    """

    limit: Literal["time", "output"] | None
    exit: int | None
    signal: int | None
    stdout: str
    stderr: str
    passed: tuple[bool, ...]
    seconds: float


class Sandbox:
    """Runs Python programs in processes of their own, without network, files, or sight of other processes.

    On Linux: namespaces of users, processes, network and mounts, a root that holds the system's programs and Python
    read-only, an empty ``/tmp`` in memory, a filter of system calls, resource limits, an empty environment. Where these
    cannot be had, every program is refused.

    Args:
        limits: of each program.
        readable: directories that programs may read besides.
        allow_weaker: where namespaces are not allowed, go on with resource limits and the filter of system calls
            (no network, no looking into processes): programs then can read what ``nobody`` or you can, and write there.
        held: numbers of system calls that the sandbox itself is not to get, as on machines that do not allow them.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        readable: Sequence[str] = (),
        allow_weaker: bool = False,
        held: tuple[int, ...] | None = None,
    ) -> None:
        if not sys.platform.startswith("linux"):
            raise ConfigError(f"programs are run in a sandbox on Linux only, and this is {sys.platform}")
        missing = [path for path in readable if not Path(path).is_dir() or not Path(path).is_absolute()]
        if missing:
            raise ConfigError(f"'{missing[0]}' is no absolute path of a directory", where="readable")
        self.limits = limits or Limits()
        self._readable, self._allow_weaker, self._held = tuple(readable), allow_weaker, held
        self._weaker = False

    @property
    def is_weaker(self) -> bool:
        """Whether programs run with less than a whole sandbox, as allowed; known after `check`."""
        return self._weaker

    def check(self) -> None:
        """Make sure that programs can be run.

        Raises:
            ConfigError: this machine does not allow a sandbox; says what is missing.
        """
        found = self._ask("", [Case()])
        if isinstance(found, str) and self._allow_weaker:
            self._weaker = True
            found = self._ask("", [Case()])
        if isinstance(found, str):
            what = f"programs cannot be run safely: {found}"
            fix = "allow user namespaces (in a container: a seccomp profile that lets unshare pass, or --cap-add "
            fix += "SYS_ADMIN), or accept limits without isolation of files and processes with allow_weaker: true"
            raise ConfigError(what, where="sandbox", fix=fix)

    def run(self, program: str, cases: Sequence[Case]) -> list[Outcome]:
        """The outcome of each case; what the program does is never an error here.

        Raises:
            RewardError: the sandbox itself failed.
        """
        found = self._ask(program, cases)
        if isinstance(found, str):
            raise RewardError(f"the sandbox failed: {found}", fix="look at memory and process limits of this machine")
        return found

    def _ask(self, program: str, cases: Sequence[Case]) -> list[Outcome] | str:
        """Outcomes, or why there are none."""
        tokens = [secrets.token_hex(16) for _ in cases]
        with tempfile.TemporaryDirectory(prefix="oarsmith-sandbox-") as root:
            request = {
                "program": program,
                "cases": [
                    {"stdin": case.stdin, "tests": _told(case, token)}
                    for case, token in zip(cases, tokens, strict=True)
                ],
                "limits": asdict(self.limits),
                "root": root,
                "readable": self._readable,
                "weaker": self._weaker,
                "hold": self._held,
            }
            text, complaint = _run(request, (self.limits.seconds + 1.0) * len(cases) + _SLACK_SECONDS)
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        if lines and "refused" in lines[0]:
            return str(lines[0]["refused"])
        if len(lines) != len(cases):
            return f"it gave {len(lines)} outcomes of {len(cases)} ({complaint.strip()[-300:] or 'no word'})"
        return [_outcome(line, token, case) for line, token, case in zip(lines, tokens, cases, strict=True)]


def _told(case: Case, token: str) -> str:
    return json.dumps({"tests": list(case.tests), "token": token}) if case.tests else ""


def _outcome(line: dict[str, Any], token: str, case: Case) -> Outcome:
    report = line.pop("report")
    passed: tuple[bool, ...] = ()
    # Only who read the tests after the program had run knows the token.
    if token in report:
        try:
            told = json.loads(report)
            passed = tuple(one is True for one in told["passed"]) if told["token"] == token else ()
        except (ValueError, KeyError, TypeError):
            passed = ()
    return Outcome(**line, passed=passed if len(passed) == len(case.tests) else ())


def _run(request: dict[str, Any], seconds: float) -> tuple[str, str]:
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _BOOT, _SOURCE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={},
        cwd="/",
    )
    try:
        out, complaint = process.communicate(json.dumps(request).encode(), timeout=seconds)
    except subprocess.TimeoutExpired:
        return "", f"no reply within {seconds:g} s"
    finally:
        _kill(process)
    return out.decode(), complaint.decode("utf-8", "replace")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """All of its group; with the first process of a namespace everything in it goes."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
