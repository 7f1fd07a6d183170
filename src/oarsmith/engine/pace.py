"""How many tokens are guessed for a request."""

from __future__ import annotations

# Tokens without guesses after a guess at a single token was wrong: as many at first, and at most.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 4, 64


class Pace:
    """How many tokens are guessed at a time for one request: what became of its earlier guesses decides.

    Twice as many where all were right; one more than were right, if any was; half as many where none was. After a
    wrong guess at a single token there are none for the next 4 tokens, then 8, and up to 64, until one is right.

    Args:
        most: tokens at a time, with which it begins.
    """

    def __init__(self, most: int) -> None:
        self._most = self._size = most
        self._pause = 0
        self._next_pause = _SHORTEST_PAUSE

    @property
    def size(self) -> int:
        """How many to guess now."""
        return 0 if self._pause > 0 else self._size

    def learn(self, guessed: int, right: int) -> None:
        """A step guessed so many tokens, of which the first ``right`` were taken, and one after them."""
        if guessed == 0:
            self._pause -= 1
            return
        if right == guessed:
            self._size = min(2 * max(self._size, guessed), self._most)
        elif right:
            self._size = min(right + 1, self._most)
        elif guessed > 1:
            self._size = guessed // 2
        else:
            self._pause, self._next_pause = self._next_pause, min(2 * self._next_pause, _LONGEST_PAUSE)
        if right:
            self._next_pause = _SHORTEST_PAUSE
