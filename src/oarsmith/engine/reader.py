"""Tokens to the text that may be shown: whole characters, and nothing of a stop text."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from oarsmith.text import StreamDecoder, Tokenizer


class StopFilter:
    """Passes text on, holding back what could be the beginning of a stop text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stopped = False
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is certain to stand before any stop text. Sets ``stopped`` once one is complete."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = self._open(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The text still held back; nothing follows it."""
        rest, self._held = self._held, ""
        return rest

    def _open(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop text."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0


class TextReader:
    """The text of one answer as its tokens arrive.

    Args:
        lead: white space that is no part of the answer (`Tokenizer.answer_lead`): an answer that begins with it is
            shown from its first character on.
        least: tokens before which no stop text is looked for.
        skip_special_tokens: leave them out of the text.

    Attributes:
        text: all that was given out so far.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        lead: str = "",
        *,
        least: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        self.text = ""
        self._least = least
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens)
        self._filter = StopFilter(stops)
        self._taken = 0
        self._lead = lead
        self._held = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop text was met."""
        return self._filter.stopped

    def fork(self) -> TextReader:
        """Another one that goes on from here."""
        other = copy.copy(self)
        other._decoder, other._filter = self._decoder.fork(), copy.copy(self._filter)
        return other

    def push(self, token: int) -> None:
        piece = self._decoder.push(token)
        self._least -= 1
        self.text += self._after_lead(piece if self._least >= 0 else self._filter.push(piece))

    def finish(self) -> None:
        """The answer is over: what was held back belongs to it, unless it completes a stop text."""
        rest = self._filter.push(self._decoder.finish()) + self._filter.finish()
        self.text += self._after_lead(rest) + without_lead(self._held, self._lead)

    def _after_lead(self, piece: str) -> str:
        if not self._lead:
            return piece
        self._held += piece
        if self._lead.startswith(self._held) or (self._held.isspace() and self._held.startswith(self._lead)):
            return ""
        text, self._lead, self._held = without_lead(self._held, self._lead), "", ""
        return text

    def take(self) -> str:
        """The text that came since the last call."""
        new, self._taken = self.text[self._taken :], len(self.text)
        return new


def without_lead(text: str, lead: str) -> str:
    """An answer without white space in front, if it begins with the lead; else as it is."""
    return text.lstrip() if lead and text.startswith(lead) else text
