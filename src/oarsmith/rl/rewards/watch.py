"""What is waited for, so that a run that hangs can say why."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Watch:
    """Waits by many threads, each with a text."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waits: dict[int, tuple[float, str]] = {}
        self._next = 0

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Within it, ``text`` is waited for."""
        with self._lock:
            key, self._next = self._next, self._next + 1
            self._waits[key] = (time.monotonic(), text)
        try:
            yield
        finally:
            with self._lock:
                del self._waits[key]

    def text(self) -> str:
        """The oldest wait with its seconds, and how many there are beside it; "": none."""
        with self._lock:
            waits = sorted(self._waits.values())
        if not waits:
            return ""
        since, text = waits[0]
        more = f", and {len(waits) - 1} more" if len(waits) > 1 else ""
        return f"{text}, for {time.monotonic() - since:.0f} s{more}"
