"""A text that is read while it comes.

Whatever is read waits (yields) until it does not depend on what follows, or until the text is over: the same is read
however the text is cut.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from typing import TypeVar

_T = TypeVar("_T")
Reading = Generator[None, None, _T]
"""Yields for more text; returns what was read."""

MAX_DEPTH = 100
"""Of brackets within one another."""

_JSON = re.compile(r"[ \t\r\n]+|[{}\[\],:]|[-+.\w]")
_CLOSES = {"{": "}", "[": "]", "(": ")"}


class Source:
    """The text.

    Attributes:
        text: what is there; what follows ``at`` is still to be read.
        over: whether nothing will follow.
    """

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.over = False

    def forget(self) -> None:
        """Lets go of what is read."""
        self.text, self.at = self.text[self.at :], 0

    def one_of(self, texts: Sequence[str]) -> Reading[str]:
        """Reads the first of these that stands here; "": none does. Where one begins another, the longer goes first."""
        for text in texts:
            while not self.over and len(self.text) - self.at < len(text) and text.startswith(self.text[self.at :]):
                yield
            if self.text.startswith(text, self.at):
                self.at += len(text)
                return text
        return ""

    def span(self, pattern: re.Pattern[str]) -> Reading[str]:
        """Reads what a pattern of a set of characters, repeated from none on, matches."""
        start = self.at
        while True:
            found = pattern.match(self.text, self.at)
            assert found is not None, pattern
            self.at = found.end()
            if self.at < len(self.text) or self.over:
                return self.text[start : self.at]
            yield

    def until(self, *ends: str) -> Reading[str | None]:
        """Reads up to the first of these, and that; None: none comes."""
        start = 0
        longest = max(map(len, ends))
        while True:
            found = [(at, end) for end in ends if (at := self.text.find(end, self.at + start)) >= 0]
            if found:
                at, end = min(found)
                text, self.at = self.text[self.at : at], at + len(end)
                return text
            if self.over:
                return None
            start = max(len(self.text) - self.at - longest + 1, 0)
            yield

    def json(self) -> Reading[str | None]:
        """Reads an object or a list; None: what stands here is neither, or does not end."""
        return (yield from self._bracketed(opening="{[", quotes='"', plain=_JSON))

    def bracketed(self, opening: str) -> Reading[str | None]:
        """Reads what stands between brackets, as Python has them."""
        return (yield from self._bracketed(opening=opening, quotes="\"'", plain=None))

    def _bracketed(self, opening: str, quotes: str, plain: re.Pattern[str] | None) -> Reading[str | None]:
        expected: list[str] = []
        quote, skip, offset = "", False, 0
        while True:
            while self.at + offset < len(self.text):
                character = self.text[self.at + offset]
                offset += 1
                if skip:
                    skip = False
                elif quote:
                    skip, quote = character == "\\", "" if character == quote else quote
                elif not expected and character not in opening:
                    return None
                elif character in quotes:
                    quote = character
                elif character in _CLOSES:
                    expected.append(_CLOSES[character])
                    if len(expected) > MAX_DEPTH:
                        return None
                elif character in "}])":
                    if expected.pop() != character:
                        return None
                elif plain is not None and not plain.match(character):
                    return None
                if not expected:
                    text = self.text[self.at : self.at + offset]
                    self.at += offset
                    return text
            if self.over:
                return None
            yield
