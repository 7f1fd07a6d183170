"""A reward server over HTTP, in the schema of PaddleNLP's: ``POST /`` with ``src``, ``tgt``, ``response``.

It answers ``{"error_code": 0, "error_msg": "", "score": [...]}``. ``oarsmith serve`` of a reward model is such a
server.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from pydantic import Field

from oarsmith.errors import ConfigError
from oarsmith.rl.completion import Completion
from oarsmith.rl.rewards.options import RewardOptions
from oarsmith.rl.rewards.values import Reward, RewardError, Value, checked, place
from oarsmith.rl.rewards.watch import Watch

_MOST_BYTES = 64 << 20
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
# Busy, starting or restarting; another try may find it well.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


class ServerOptions(RewardOptions):
    """Options of a server."""

    column: str = Field("tgt", description="Column of the row with the reference answer, sent as `tgt`.")
    timeout: float = Field(60.0, gt=0, description="Seconds for each request.")
    retries: int = Field(3, ge=0, description="Further tries after one that failed for a passing reason.")
    batch_size: int = Field(64, ge=1, le=2048, description="Answers in a request.")
    workers: int = Field(4, ge=1, description="Requests at a time.")
    on_failure: Literal["raise", "zeros", "none"] = Field(
        "raise",
        description="When the server does not give scores: raise ends the run and says why; zeros gives 0 to the "
        "answers of that request (as PaddleNLP does), none no score; both are counted and reported.",
    )


class _PassingError(Exception):
    """Worth another try; always caught here."""


class ServerReward(Reward):
    """Asks a server. Addresses of this machine are reached without a proxy.

    Raises:
        ConfigError: no address of http or https.
    """

    def __init__(self, options: ServerOptions) -> None:
        parts = urllib.parse.urlsplit(options.reward)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"'{options.reward}' is no address of a server", fix="write http://host:port")
        super().__init__(options.name or parts.netloc.rpartition("@")[2], waits=True)
        self._options = options
        self._shown = urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        proxies: dict[str, str] | None = {} if _is_loopback(parts.hostname) else None
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies), _NoRedirect())
        self._lock = threading.Lock()

    def values(self, batch: Sequence[Completion], watch: Watch) -> list[Value | RewardError]:
        size = self._options.batch_size
        starts = range(0, len(batch), size)
        with ThreadPoolExecutor(self._options.workers, thread_name_prefix="oarsmith-reward") as pool:
            parts = pool.map(lambda start: self._asked(batch, range(len(batch))[start : start + size], watch), starts)
            return [value for part in parts for value in part]

    def _asked(self, batch: Sequence[Completion], places: range, watch: Watch) -> list[Value | RewardError]:
        answers = [batch[index] for index in places]
        body = {
            "src": [one.prompt for one in answers],
            "tgt": [_text(one.row.get(self._options.column)) for one in answers],
            "response": [one.text for one in answers],
        }
        try:
            with watch.waiting(f"reward server {self._shown} for {len(answers)} answers"):
                scores = self._scores(json.dumps(body).encode(), len(answers))
        except RewardError as error:
            if self._options.on_failure == "raise":
                raise
            with self._lock:
                self.failures += len(answers)
                self.last_failure = str(error)
            return [0.0 if self._options.on_failure == "zeros" else None] * len(answers)
        return [
            checked(score, name=self.name, where=place(batch, index))
            for score, index in zip(scores, places, strict=True)
        ]

    def _scores(self, body: bytes, count: int) -> list[Any]:
        pause = _FIRST_PAUSE
        for attempt in range(self._options.retries + 1):
            try:
                return self._read(self._post(body), count)
            except _PassingError as error:
                if attempt == self._options.retries:
                    tries = f" ({attempt + 1} tries)" if attempt else ""
                    fix = "see whether it runs and can be reached from here; raise timeout or retries if it is slow"
                    raise RewardError(
                        f"the reward server failed: {error}{tries}", where=self._shown, fix=fix
                    ) from error
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        raise AssertionError("the last try returns or raises")

    def _post(self, body: bytes) -> bytes:
        """The answer's body; of an error too, if it is one in the schema."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        request = urllib.request.Request(self._options.reward, body, headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._options.timeout) as answer:
                return self._limited(answer.read(_MOST_BYTES + 1))
        except urllib.error.HTTPError as error:
            try:
                said = error.read(2000).decode("utf-8", "replace").strip()
            except (OSError, http.client.HTTPException):
                said = ""
            what = f"HTTP {error.code} {error.reason}: {said[:300]}"
            if error.code in _PASSING:
                raise _PassingError(what) from error
            raise RewardError(f"the reward server refused: {what}", where=self._shown) from error
        except TimeoutError as error:
            raise _PassingError(f"no answer within {self._options.timeout:g} s") from error
        except urllib.error.URLError as error:
            slow = isinstance(error.reason, TimeoutError)
            why = f"no answer within {self._options.timeout:g} s" if slow else str(error.reason)
            raise _PassingError(why) from error
        except (OSError, http.client.HTTPException) as error:
            raise _PassingError(f"the connection broke ({type(error).__name__}: {error})") from error

    def _limited(self, body: bytes) -> bytes:
        if len(body) > _MOST_BYTES:
            raise RewardError(f"the reward server sent more than {_MOST_BYTES >> 20} MiB", where=self._shown)
        return body

    def _read(self, body: bytes, count: int) -> list[Any]:
        shown = body[:200].decode("utf-8", "replace")
        try:
            found = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RewardError(f"the reward server sent no JSON: {shown!r}", where=self._shown) from error
        if not isinstance(found, dict) or ("score" not in found and "error_code" not in found):
            fix = 'it must answer {"error_code": 0, "error_msg": "", "score": [...]}'
            raise RewardError(f"the reward server sent no scores: {shown!r}", where=self._shown, fix=fix)
        code = found.get("error_code", 0)
        if code not in (0, "0", None):
            what = f"the reward server reports error {code}: {str(found.get('error_msg', ''))[:300]}"
            raise RewardError(what, where=self._shown)
        scores = found.get("score")
        if not isinstance(scores, list) or len(scores) != count:
            num = len(scores) if isinstance(scores, list) else "no"
            raise RewardError(f"the reward server sent {num} scores for {count} answers", where=self._shown)
        return scores


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive without its body: it is an error instead."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _text(value: object) -> str:
    """A reference as text: what is none is sent as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
