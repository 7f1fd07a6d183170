"""Requests that wait for their turn."""

from __future__ import annotations

import heapq

from oarsmith.engine.request import Request


class Line:
    """Those that wait, by priority, then by arrival."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Request]] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def join(self, request: Request) -> None:
        request.waiting = True
        self._size += 1
        heapq.heappush(self._heap, (*request.order(), request))

    def leave(self, request: Request) -> None:
        """It waits no longer."""
        # It stays in the heap until it comes to the front.
        request.waiting = False
        self._size -= 1

    @property
    def first(self) -> Request | None:
        """Whose turn is next."""
        while self._heap and not self._heap[0][2].waiting:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None
