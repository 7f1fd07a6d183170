"""A step: what is computed of which requests. No tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from oarsmith.engine.choice import Draft
from oarsmith.engine.request import Request


@dataclass(eq=False)
class Chunk:
    """Tokens [start, stop) of a request; those before ``start`` are in the cache.

    ``room``: how many guesses may follow them; ``drafts``: those that do.
    """

    request: Request
    start: int
    stop: int
    room: int = 0
    drafts: list[Draft] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether the next token follows from it."""
        return self.stop == len(self.request.tokens)


@dataclass
class Step:
    """One call of the model.

    ``copies``: (source, target) of pages to be copied before it, in this order.
    """

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    # Added up as chunks come: with 128 answers a step summing anew for each was a seventh of its time.
    _num_counted: int = field(default=0, init=False)
    _num_tokens: int = field(default=0, init=False)

    @property
    def num_tokens(self) -> int:
        """With room for guesses."""
        new = self.chunks[self._num_counted :]
        self._num_counted = len(self.chunks)
        self._num_tokens += sum(chunk.stop - chunk.start + chunk.room for chunk in new)
        return self._num_tokens

    def drop_preempted(self) -> None:
        """Leave out what belongs to requests that have lost their pages."""
        self.chunks = [chunk for chunk in self.chunks if chunk.request.table is not None]
        self._num_counted = self._num_tokens = 0

    def brings(self, request: Request, end: int) -> bool:
        """Whether it computes the request's token before ``end`` for somebody else who begins alike."""
        others = [chunk for chunk in self.chunks if chunk.request.salt == request.salt]
        tokens = request.tokens[:end]
        return any(chunk.start < end <= chunk.stop and chunk.request.tokens[:end] == tokens for chunk in others)
