"""An answer in pieces of text."""

from __future__ import annotations

from collections.abc import Iterator

from oarsmith.engine.desk import Desk
from oarsmith.engine.request import Completion
from oarsmith.engine.ticket import Ticket


class Stream(Iterator[str]):
    """Pieces of an answer; joined they are its text.

    Several streams of an engine, and whatever else it works on, share its steps: each may be read at its own pace.
    One that is closed or forgotten is given up.

    Attributes:
        completion: the whole answer, once the pieces are exhausted.
    """

    def __init__(self, desk: Desk, ticket: Ticket) -> None:
        self.completion: Completion | None = None
        self._desk = desk
        self._ticket = ticket
        (self._request,) = ticket.requests

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far."""
        return self._request.num_generated

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._request.prompt)

    def __next__(self) -> str:
        reader = self._request.reader
        assert reader is not None
        while not (piece := reader.take()):
            if self._request.error is not None:
                raise self._request.error
            if self._request.finish_reason is not None:
                if self.completion is None:
                    self.completion = self._desk.completion(self._ticket)
                raise StopIteration
            if not self._desk.is_open(self._ticket.id):
                raise StopIteration
            self._desk.advance()
        return piece

    def close(self) -> None:
        """Give up the answer, if it is not finished."""
        self._desk.abort(self._ticket.id)

    def __del__(self) -> None:
        self.close()
