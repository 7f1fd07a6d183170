"""Who asks, and what one request has cost so far."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from oarsmith.errors import OarsmithError

_MINUTE = 60.0


class LimitError(OarsmithError):
    """A caller asks for more than its key allows.

    Args:
        seconds: until it may ask again.
    """

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(what, fix=f"try again in {max(1, round(seconds + 0.5))} seconds")
        self.seconds = max(1, round(seconds + 0.5))


class Bucket:
    """So many a minute, and as many at once. It may be overdrawn: what something costs is known only afterwards."""

    def __init__(self, per_minute: int) -> None:
        self._most = float(per_minute)
        self._left, self._at = self._most, time.monotonic()

    def wait(self, count: float) -> float:
        """Seconds until so much is left; 0: now."""
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._at) * self._most / _MINUTE)
        self._at = now
        return max(0.0, (min(count, self._most) - self._left) * _MINUTE / self._most)

    def take(self, count: float) -> None:
        self._left -= count


@dataclass(eq=False)
class Caller:
    """The holder of a key.

    Args:
        concurrency: answers that may be open at once; None: no limit of its own, as for the others.
    """

    name: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    num_open: int = 0

    def __post_init__(self) -> None:
        self._requests = None if self.requests_per_minute is None else Bucket(self.requests_per_minute)
        self._tokens = None if self.tokens_per_minute is None else Bucket(self.tokens_per_minute)

    def ask(self) -> None:
        """Count a request.

        Raises:
            LimitError: there were too many, or too many tokens.
        """
        if self._requests is not None:
            seconds = self._requests.wait(1.0)
            if seconds > 0:
                raise LimitError(f"this key may ask {self.requests_per_minute} times a minute", seconds)
        if self._tokens is not None:
            seconds = self._tokens.wait(1.0)
            if seconds > 0:
                raise LimitError(f"this key may use {self.tokens_per_minute} tokens a minute", seconds)
        if self._requests is not None:
            self._requests.take(1.0)

    def open(self) -> None:
        """One more answer.

        Raises:
            LimitError: too many are open.
        """
        if self.concurrency is not None and self.num_open >= self.concurrency:
            raise LimitError(f"this key may have {self.concurrency} answers open at once", 1.0)
        self.num_open += 1

    def close(self, num_tokens: int) -> None:
        """One less, and what it cost."""
        self.num_open -= 1
        if self._tokens is not None:
            self._tokens.take(num_tokens)

    def inherit(self, other: Caller) -> None:
        """Go on from what another holder of the same name has used, where the limits are the same."""
        self.num_open = other.num_open
        if self.requests_per_minute == other.requests_per_minute:
            self._requests = other._requests
        if self.tokens_per_minute == other.tokens_per_minute:
            self._tokens = other._tokens


@dataclass(eq=False)
class Call:
    """One request on its way.

    Args:
        caller: None where no keys are needed.
        keep_text: for a log with prompts.
    """

    id: str
    caller: Caller | None = None
    keep_text: bool = False
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    prompts: list[list[int]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


# The request that the running task works on. The worker looks here, so that protocols need not hand it on.
current_call: ContextVar[Call | None] = ContextVar("current_call", default=None)
