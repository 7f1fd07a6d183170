"""Reward servers on real sockets: the schema, tries, limits of time, and what they get wrong."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from oarsmith.rl.completion import Completion
from oarsmith.rl.rewards import server
from oarsmith.rl.rewards.rewards import Rewards
from oarsmith.rl.rewards.values import RewardError

BATCH = [Completion("q", f"answer {n}", (1,), row={"tgt": str(n), "n": n}) for n in range(5)]
Reply = Callable[[dict[str, Any], int], tuple[int, Any]]


@contextmanager
def serving(reply: Reply) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    asked: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                asked.append(body)
                number = len(asked)
            status, found = reply(body, number)
            data = found if isinstance(found, bytes) else json.dumps(found).encode()
            if status == 0:
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if status in (301, 302):
                self.send_header("Location", "/elsewhere")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_port}/", asked
    finally:
        made.shutdown()
        made.server_close()
        thread.join()


def right(body: dict[str, Any], number: int) -> tuple[int, Any]:
    scores = [float(text.split()[-1] == tgt) for text, tgt in zip(body["response"], body["tgt"], strict=True)]
    return 200, {"error_code": 0, "error_msg": "", "score": scores}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_FIRST_PAUSE", 0.05)
    # A proxy that nobody is: this machine's own addresses are asked without it.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")


def test_the_suite_s_schema() -> None:
    with serving(right) as (url, asked):
        found = Rewards.from_settings({"reward": url, "batch_size": 2, "workers": 1}).score(BATCH)
        assert found.total == [1.0] * 5 and [len(body["src"]) for body in asked] == [2, 2, 1]
        assert asked[0] == {"src": ["q", "q"], "tgt": ["0", "1"], "response": ["answer 0", "answer 1"]}
        other = Rewards.from_settings({"reward": url, "column": "n", "name": "mine"}).score(BATCH)
        assert other.parts == {"mine": [1.0] * 5}


def test_further_tries() -> None:
    def busy(body: dict[str, Any], number: int) -> tuple[int, Any]:
        return (503, b"starting") if number == 1 else (0, b"") if number == 2 else right(body, number)

    with serving(busy) as (url, asked):
        assert Rewards.from_settings(url).score(BATCH).total == [1.0] * 5 and len(asked) == 3
    with serving(lambda *_: (503, b"never")) as (url, asked):
        with pytest.raises(RewardError, match=r"HTTP 503 .*never \(3 tries\)"):
            Rewards.from_settings({"reward": url, "retries": 2}).score(BATCH)
        assert len(asked) == 3


@pytest.mark.parametrize(
    ("status", "found", "part"),
    [
        (400, {"error_code": 400, "error_msg": "too long"}, "refused: HTTP 400 .*too long"),
        (200, {"error_code": 7, "error_msg": "no reference", "score": []}, "reports error 7: no reference"),
        (200, {"error_code": 0, "error_msg": "", "score": [1.0]}, "sent 1 scores for 5 answers"),
        (200, {"error_code": 0, "error_msg": ""}, "sent no scores for 5 answers"),
        (200, {"error_code": 0, "score": [1, 2, None, "x", 5]}, "answer 4 of 5.*returned 'x'"),
        (200, b'{"error_code": 0, "score": [1, 2, 3, 4, NaN]}', "answer 5 of 5.*returned nan"),
        (200, b"<html>", "sent no JSON: '<html>'"),
        (200, [1, 2], "sent no scores"),
        (302, b"", "HTTP 302"),
    ],
)
def test_what_is_wrong_is_said(status: int, found: Any, part: str) -> None:
    with serving(lambda *_: (status, found)) as (url, asked):
        with pytest.raises(RewardError, match=part):
            Rewards.from_settings(url).score(BATCH)
        assert len(asked) == 1, "another try would give the same"


def test_time_and_nobody_there() -> None:
    def slow(body: dict[str, Any], number: int) -> tuple[int, Any]:
        time.sleep(0.8)
        return right(body, number)

    with serving(slow) as (url, _):
        rewards = Rewards.from_settings({"reward": url, "timeout": 0.2, "retries": 1})
        seen: list[str] = []
        threading.Timer(0.1, lambda: seen.append(rewards.waiting_for())).start()
        with pytest.raises(RewardError, match=r"no answer within 0\.2 s \(2 tries\)"):
            rewards.score(BATCH)
        assert seen[0].startswith(f"reward server {url} for 5 answers")
    with pytest.raises(RewardError, match=r"[Rr]efused"):
        Rewards.from_settings({"reward": url, "retries": 0}).score(BATCH)


@pytest.mark.parametrize(("rule", "value"), [("zeros", 0.0), ("none", None)])
def test_zeros_as_the_suite_has_them(rule: str, value: float | None) -> None:
    with serving(lambda *_: (500, b"")) as (url, _):
        rewards = Rewards.from_settings({"reward": url, "retries": 0, "on_failure": rule, "name": "far"})
        assert rewards.score(BATCH).total == [value] * 5
        assert rewards.failures == {"far": 5} and "HTTP 500" in rewards.last_failure["far"]
