"""Several engines behind one endpoint, on Ray Serve; real processes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from oarsmith.errors import MissingExtraError
from oarsmith.serve import replicas
from oarsmith.serve.replicas import Replicas, require_ray, serve_replicas, threads_of_each
from tiny import environment, write_tiny_model

SCRIPT = Path(__file__).with_name("replica_server.py")
installed = all(find_spec(name) is not None for name in ("ray", "aiohttp_cors", "httptools"))
needs_ray = pytest.mark.skipif(not installed, reason="needs ray[serve]")


def _nothing(threads: int) -> None:
    return None


def test_cores_are_divided(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert threads_of_each(Replicas(build=_nothing, count=3), cluster=False) == 2
    assert threads_of_each(Replicas(build=_nothing, count=16), cluster=False) == 1
    assert threads_of_each(Replicas(build=_nothing, count=2, num_threads=6), cluster=False) == 3
    # On a cluster the number is of each replica: who starts it does not see those machines.
    assert threads_of_each(Replicas(build=_nothing, count=2, num_threads=6), cluster=True) == 6


def test_a_missing_ray_is_named_before_anything_starts(monkeypatch):
    monkeypatch.setattr(replicas, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"oarsmith\[ray\]"):
        require_ray()
    with pytest.raises(MissingExtraError):
        serve_replicas(Replicas(build=_nothing, count=2))


def _say(url: str, tokens: int, pause: float) -> tuple[list[str], float]:
    """The lines of an answer, as many as came, and when they ended."""
    lines = []
    with (
        contextlib.suppress(httpx.HTTPError),
        httpx.stream("GET", f"{url}/say", params={"tokens": tokens, "pause": pause}, timeout=60) as reply,
    ):
        if reply.status_code == 200:
            lines.extend(reply.iter_lines())
    return lines, time.monotonic()


def _pids(url: str) -> set[int]:
    found = set()
    for _ in range(30):
        with contextlib.suppress(httpx.HTTPError):
            reply = httpx.get(f"{url}/pid", timeout=10)
            if reply.status_code == 200:
                found.add(reply.json()["pid"])
    return found


def _until(true, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.2)


@contextlib.contextmanager
def _served(model: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, str(SCRIPT), str(model), str(port)]
    # Ray would take the tests' own cluster, if there is one.
    settings = {name: value for name, value in environment().items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(words, env=settings, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        _until(lambda: process.poll() is not None or len(_pids(url)) == 2, 120)
        assert process.poll() is None, "it did not start"
        yield process, url
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


@needs_ray
@pytest.mark.slow
def test_a_killed_replica_is_missed_by_its_own_clients_only(tmp_path):
    with _served(write_tiny_model(tmp_path / "model")) as (process, url), ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(_say, url, 60, 0.1) for _ in range(8)]
        time.sleep(2)
        before = _pids(url)
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        answers = [job.result() for job in jobs]
        lost = [end - killed for lines, end in answers if lines[0] == str(victim)]
        kept = [lines for lines, _ in answers if lines[0] != str(victim)]
        assert lost and kept, "both had something to do"
        assert max(lost) < 3, "they were told at once"
        assert {(lines[-1], len(lines) > 60) for lines in kept} == {("end", True)}
        _until(lambda: len(_pids(url)) == 2)
        assert victim not in _pids(url)

        # A client that goes away leaves nothing behind, through Ray's proxy too.
        with httpx.stream("GET", f"{url}/say", params={"tokens": 100, "pause": 0.5}) as reply:
            next(reply.iter_lines())
        _until(lambda: {httpx.get(f"{url}/pid").json()["open"] for _ in range(20)} == {0}, 15)

        # Told to end, it answers what it took.
        jobs = [pool.submit(_say, url, 30, 0.1) for _ in range(4)]
        time.sleep(1)
        process.terminate()
        assert {job.result()[0][-1] for job in jobs} == {"end"}
        assert process.wait(60) == 0
