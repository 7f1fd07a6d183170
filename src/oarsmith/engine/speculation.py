"""Speculative decoding: tokens that somebody guesses, and that one step of the model checks all at once.

Leviathan et al. 2023; Chen et al. 2023. Guesses change how fast an answer comes, never its distribution. What is
guessed for a request, and how much, follows from that request alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from oarsmith.engine.backend import Backend
from oarsmith.engine.choice import Draft
from oarsmith.engine.request import Request
from oarsmith.engine.step import Step


class Drafter(Protocol):
    """Who guesses."""

    @property
    def backends(self) -> Sequence[Backend]:
        """Caches of its own whose pages are those of the model's cache."""

    def draft(self, step: Step) -> None:
        """Fill in the step's guesses: for each piece at most as many as it has room for."""


class NgramDrafter:
    """What followed the last time when the text ended like this (prompt lookup decoding, Saxena 2023).

    Args:
        shortest: tokens that must be alike.
        longest: tokens up to which a longer likeness is preferred.
    """

    backends: Sequence[Backend] = ()

    def __init__(self, shortest: int, longest: int) -> None:
        self._shortest = shortest
        self._longest = longest
        self._texts: WeakKeyDictionary[Request, Text] = WeakKeyDictionary()

    def draft(self, step: Step) -> None:
        for chunk in step.chunks:
            if chunk.room:
                text = self._texts.setdefault(chunk.request, Text())
                text.extend(chunk.request.tokens)
                found = text.continuation(chunk.room, self._shortest, self._longest)
                chunk.drafts += [Draft(token) for token in found]


class Text:
    """Token ids in a growing array."""

    def __init__(self) -> None:
        self._size = 0
        self._ids = np.empty(256, dtype=np.int32)

    def extend(self, tokens: Sequence[int]) -> None:
        """``tokens`` is the whole text; what is known of it stays as it is."""
        if len(tokens) > len(self._ids):
            self._ids = np.resize(self._ids, 2 * len(tokens))
        self._ids[self._size : len(tokens)] = tokens[self._size :]
        self._size = len(tokens)

    def continuation(self, count: int, shortest: int, longest: int) -> list[int]:
        """Up to ``count`` tokens that followed the latest earlier place where the last tokens stood as they do now.

        Of all earlier places those count that are alike for the most tokens (up to ``longest``); the latest after
        which there are ``count`` tokens, or else the first.
        """
        ids = self._ids[: self._size]
        places, alike = np.flatnonzero(ids[:-1] == ids[-1]), 1
        while alike < longest and len(more := self._alike(places, alike)):
            places, alike = more, alike + 1
        if not len(places) or alike < shortest:
            return []
        index = int(np.searchsorted(places, len(ids) - 1 - count, side="right")) - 1
        start = int(places[max(index, 0)]) + 1
        return ids[start : start + count].tolist()

    def _alike(self, places: NDArray[np.int64], back: int) -> NDArray[np.int64]:
        """Those of the places before which the token ``back`` places earlier is the one that stands so at the end."""
        if back >= self._size:
            return places[:0]
        places = places[places >= back]
        return places[self._ids[places - back] == self._ids[self._size - 1 - back]]
