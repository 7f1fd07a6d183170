"""Programs that mean harm: real processes, on this machine as it is, as root and as a plain user."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from oarsmith.errors import ConfigError
from oarsmith.rl.rewards.sandbox import seccomp
from oarsmith.rl.rewards.sandbox.sandbox import Case, Limits, Outcome, Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")
SRC = Path(seccomp.__file__).parents[4]
LIMITS = Limits(seconds=2.0)
UNSHARE = {"x86_64": 272, "aarch64": 97}


def allowed() -> bool:
    try:
        Sandbox().check()
    except ConfigError:
        return False
    return True


whole = pytest.mark.skipif(not allowed(), reason="this machine allows no namespaces; see the tests of the refusal")


def run(program: str, *, stdin: str = "", tests: tuple[str, ...] = (), limits: Limits = LIMITS) -> Outcome:
    (found,) = Sandbox(limits).run(program, [Case(stdin, tests)])
    return found


@whole
def test_plain_programs() -> None:
    found = run("import sys\nprint(input()[::-1])\nprint('é', file=sys.stderr)", stdin="abc\n")
    assert (found.exit, found.stdout, found.stderr, found.limit) == (0, "cba\n", "é\n", None)
    assert run("import sys; sys.exit(3)").exit == 3 and run("1/0").exit == 1
    assert "SyntaxError" in run("def").stderr and run("x = '\ud800'\x00").exit == 1
    assert run("import json, math, collections, dataclasses, re, itertools, heapq, decimal").exit == 0
    many = Sandbox(LIMITS).run("print(int(input()) ** 2)", [Case(str(n)) for n in range(4)])
    assert [one.stdout for one in many] == ["0\n", "1\n", "4\n", "9\n"]


@whole
def test_tests_run_in_its_names() -> None:
    found = run(
        "def f(x):\n    return x + 1", tests=("assert f(1) == 2", "assert f(1) == 3", "y = f(2)", "assert y == 3")
    )
    assert found.passed == (True, False, True, True) and "AssertionError" in found.stderr


@whole
@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "import sys; sys.exit()",
        'import os\nfor fd in range(3, 64):\n    try: os.write(fd, b\'{"token": "", "passed": [true]}\')\n'
        "    except OSError: pass\nos._exit(0)",
        "import builtins\nbuiltins.exec = lambda *a: None\nraise KeyboardInterrupt",
    ],
)
def test_an_early_end_passes_nothing(program: str) -> None:
    assert run(program, tests=("assert f() == 1",)).passed == ()


@whole
def test_an_endless_loop() -> None:
    began = time.monotonic()
    for program in ("while True: pass", "import time; time.sleep(60)", "import signal\nsignal.pause()"):
        found = run(program, limits=Limits(seconds=0.5))
        assert found.limit == "time" and found.exit is None
    ignoring = "import signal\nfor n in range(1, 65):\n"
    ignoring += "    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
    assert run(ignoring + "while True: pass", limits=Limits(seconds=0.5)).limit == "time"
    assert time.monotonic() - began < 10


@whole
def test_a_fork_bomb_is_over_and_leaves_others_alone() -> None:
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    children = "import os, time\nfor n in range(4):\n"
    children += "    if os.fork() == 0:\n        os.setsid(); time.sleep(600)\nprint('left')"
    found: dict[str, Outcome] = {}

    def bombing() -> None:
        found["bomb"] = run(bomb, limits=Limits(seconds=1.5))

    thread = threading.Thread(target=bombing)
    thread.start()
    time.sleep(0.4)
    began = time.monotonic()
    beside = run("import os\npid = os.fork()\nif pid == 0: os._exit(0)\nos.waitpid(pid, 0)\nprint('fine')")
    assert beside.stdout == "fine\n", beside
    thread.join()
    assert found["bomb"].limit == "time"
    assert run(children).stdout == "left\n" and time.monotonic() - began < 15
    assert run(
        "import os\nn = 0\ntry:\n    while True:\n        if os.fork() == 0: import time; time.sleep(9)\n"
        "        n += 1\n"
        "except OSError: print(n)"
    ).stdout.strip() in {str(n) for n in range(1, 9)}


@whole
def test_memory_files_and_output() -> None:
    assert "MemoryError" in run("x = bytearray(2 << 30)").stderr
    assert run("x = []\nwhile True: x.append(bytes(1 << 20))").exit == 1
    assert "File too large" in run("open('a', 'wb').write(bytes(32 << 20))").stderr
    many = "for n in range(40):\n    open(str(n), 'wb').write(bytes(1 << 20))"
    assert "No space left" in run(many).stderr
    assert "No space" in run("for n in range(10**6): open(str(n), 'w').close()").stderr
    began = time.monotonic()
    for end in ("stdout", "stderr"):
        found = run(f"import sys\nwhile True: sys.{end}.write('y' * 65536)")
        assert found.limit == "output" and len(found.stdout) <= LIMITS.output
    assert time.monotonic() - began < 5


@whole
def test_nothing_of_this_machine_is_seen(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o666)
    os.environ["OARSMITH_TEST_SECRET"] = "secret"
    try:
        found = run(
            "import os\n"
            f"for name in ('/etc/passwd', '/proc/1/environ', '/proc/self/root/etc/passwd', {str(secret)!r}, '/sys',\n"
            "             '/home', '/var', '/dev/mem', '/dev/sda', '/run'):\n"
            "    assert not os.path.exists(name), name\n"
            "assert 'secret' not in str(os.environ), os.environ\n"
            "import sys\n"
            "for place in ('/', '/usr', '/usr/bin', '/dev', sys.base_prefix, '/tmp/..', '/lib'):\n"
            "    try: open(place + '/x', 'w')\n"
            "    except OSError: continue\n"
            "    raise AssertionError(place)\n"
            "open('/tmp/mine', 'w').write('x')\n"
            "assert os.getuid() != 0 or not os.access('/etc', os.R_OK)\n"
            "print(sorted(os.listdir('/')))\n"
        )
    finally:
        del os.environ["OARSMITH_TEST_SECRET"]
    assert found.exit == 0, found.stderr
    assert secret.read_text() == "secret"


@whole
def test_no_network() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        for family in ("AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK"):
            found = run(f"import socket\nsocket.socket(socket.{family}).connect(('127.0.0.1', {port}))")
            assert found.exit == 1 and "Operation not permitted" in found.stderr
        assert run("import asyncio\nasync def f(): return 1\nprint(asyncio.run(f()))").stdout == "1\n"


@whole
def test_nobody_is_killed_and_nothing_is_gained() -> None:
    pid = os.getpid()
    program = (
        "import os, signal, ctypes\n"
        f"for pid in [{pid}, os.getppid(), 1, 2, *range(100, 3000)]:\n"
        "    if pid == os.getpid(): continue\n"
        "    try: os.kill(pid, signal.SIGKILL)\n    except OSError: pass\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "for flags in (0x10000000, 0x20000, 0x40000000): assert libc.unshare(flags) == -1\n"
        "assert libc.ptrace(16, 1, 0, 0) == -1 and libc.mount(b'a', b'/tmp', b'tmpfs', 0, b'') == -1\n"
        "assert libc.syscall(425, 1, 0) == -1\n"
        "for call in (lambda: os.setuid(0), lambda: os.chroot('/tmp'), lambda: os.chown('/tmp', 0, 0)):\n"
        "    try: call()\n    except OSError: continue\n    raise AssertionError\n"
        "print('alive')\n"
    )
    found = run(program)
    assert found.exit == 0 and found.stdout == "alive\n", found.stderr
    assert run("import os\nos.kill(0, 9)").signal == signal.SIGKILL
    assert run("import os\nos.kill(-1, 9)\nprint('still')").limit is None
    assert run("print('next')").stdout == "next\n"


@whole
def test_nothing_runs_on(tmp_path: Path) -> None:
    """Neither after the end of a program that left children, nor after the one that asked is killed."""
    mark = f"oarsmith{os.getpid()}"
    run(f"import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.execv('/bin/sleep', ['{mark}', '600'])")
    code = (
        f"import sys; sys.path.insert(0, {str(SRC)!r})\n"
        "from oarsmith.rl.rewards.sandbox.sandbox import *\n"
        f"Sandbox(Limits(seconds=60)).run(\"import os; os.execv('/bin/sleep', ['{mark}', '600'])\", [Case()])"
    )
    asking = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)})
    try:
        for _ in range(100):
            if mark in names_of_processes():
                break
            time.sleep(0.1)
        assert mark in names_of_processes()
    finally:
        asking.kill()
        asking.wait()
    for _ in range(50):
        if mark not in names_of_processes():
            return
        time.sleep(0.1)
    raise AssertionError("it runs on")


def names_of_processes() -> str:
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().split(b"\0")
        except OSError:
            continue
        found.append(words[0].decode("utf-8", "replace"))
    return "\n".join(found)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root to become somebody else")
@whole
def test_as_a_plain_user(tmp_path: Path) -> None:
    """The same without root: a copy of the sources that this user may read."""
    shutil.copytree(
        SRC / "oarsmith", tmp_path / "src" / "oarsmith", ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if python is None or not os.access(python, os.X_OK):
        pytest.skip("there is no python that others may run")
    for place in (tmp_path, *tmp_path.parents):
        if place.stat().st_mode & 0o005 != 0o005:
            place.chmod(place.stat().st_mode | 0o055) if place.is_relative_to("/tmp/pytest-of-root") else None
    code = (
        "import json, sys, tempfile; sys.path.insert(0, sys.argv[1])\n"
        "from oarsmith.rl.rewards.sandbox import jail\njail.main()"
    )
    with_root = tmp_path / "root"
    with_root.mkdir(mode=0o777)
    os.chown(with_root, 12345, 12345)
    import json

    program = (
        "import os\nprint(os.getuid(), os.path.exists('/etc/passwd'), sorted(os.listdir('/')))\n"
        "try: open('/usr/x', 'w')\nexcept OSError as error: print(error.strerror)\n"
        "try:\n    import socket; socket.socket()\nexcept OSError as error: print(error.strerror)\n"
    )
    limits = {"seconds": 5.0, "memory": 512 << 20, "files": 1 << 20, "output": 1 << 16, "processes": 4}
    request = {"program": program, "cases": [{"stdin": "", "tests": ""}], "limits": limits, "root": str(with_root)}
    request |= {"readable": [], "weaker": False, "hold": None}
    done = subprocess.run(
        [
            "setpriv",
            "--reuid=12345",
            "--regid=12345",
            "--clear-groups",
            python,
            "-I",
            "-S",
            "-c",
            code,
            str(tmp_path / "src"),
        ],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env={},
        cwd="/",
        check=False,
    )
    found = json.loads(done.stdout.splitlines()[0]) if done.stdout else {"refused": done.stderr}
    if "refused" in found and "not permitted" in found["refused"]:
        pytest.skip(found["refused"])
    first, *rest = found["stdout"].splitlines()
    assert first.startswith("12345 False") and rest == ["Read-only file system", "Operation not permitted"], found


def test_refused_where_it_cannot_be_enforced() -> None:
    """As in a container that does not let unshare pass: not run at all, unless less is accepted."""
    held = (UNSHARE[os.uname().machine],)
    with pytest.raises(
        ConfigError, match=r"programs cannot be run safely: namespaces are not allowed.*\n.*allow_weaker"
    ):
        Sandbox(LIMITS, held=held).check()
    weaker = Sandbox(LIMITS, held=held, allow_weaker=True)
    weaker.check()
    assert weaker.is_weaker
    programs = {
        "print('fine')": (0, "fine\n"),
        "import socket\nsocket.socket()": (1, ""),
        "x = bytearray(2 << 30)": (1, ""),
        "open('mine', 'w').write('x')\nprint(open('mine').read())": (0, "x\n"),
    }
    for program, expected in programs.items():
        (found,) = weaker.run(program, [Case()])
        assert (found.exit, found.stdout) == expected, (program, found)
    (found,) = weaker.run("def f(): return 1", [Case(tests=("assert f() == 1",))])
    assert found.passed == (True,)
    brief = Sandbox(Limits(seconds=0.5), held=held, allow_weaker=True)
    brief.check()
    (found,) = brief.run("while True: pass", [Case()])
    assert found.limit == "time"


def test_directories_that_it_may_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no absolute path"):
        Sandbox(readable=["relative"])
    if not allowed():
        return
    place = Path("/opt") if Path("/opt").is_dir() else tmp_path
    (found,) = Sandbox(LIMITS, readable=[str(place)]).run(
        f"import os\nos.listdir({str(place)!r})\nopen({str(place)!r} + '/x', 'w')", [Case()]
    )
    assert "Read-only file system" in found.stderr
