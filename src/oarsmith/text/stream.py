"""Ids to text one token at a time."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from oarsmith.text.cleanup import clean_up_spaces, settled_length

if TYPE_CHECKING:
    from oarsmith.text.tokenizer import Tokenizer

_WINDOW = 48
_REPLACEMENT = "\ufffd"


class StreamDecoder:
    """Decodes a growing sequence: `push` gives the text that is certain, `finish` the rest.

    The pieces joined equal `tokenizer.decode` of all the ids, for every id sequence. Only a window of ids is
    decoded again at each step, so a step costs the same however long the sequence is.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._backend = tokenizer.backend
        self._skip = skip_special_tokens
        self._cleans = tokenizer.cleans_spaces
        self._ids: list[int] = []
        self._emitted = 0  # characters of the window's text already handed on
        self._unclean = ""  # handed on by the window, held back until cleaning can no longer change it

    def fork(self) -> StreamDecoder:
        """Another one that goes on from here."""
        other = copy.copy(self)
        other._ids = list(self._ids)
        return other

    def push(self, token_id: int) -> str:
        """Add one id; the text that became certain, often empty."""
        if self._skip and token_id in self._backend.special_ids:
            return ""
        self._ids.append(token_id)
        if self._backend.unsettled(token_id, self._skip):
            return ""
        text = self._decode(self._ids)
        stable = len(text.rstrip(_REPLACEMENT))
        # Bytes of an unfinished character show as U+FFFD until the rest of it arrives.
        new = text[self._emitted : stable] if stable > self._emitted else ""
        self._emitted = max(self._emitted, stable)
        if stable == len(text) and len(self._ids) > _WINDOW:
            self._shorten(text)
        return self._clean(new)

    def finish(self) -> str:
        """The text still held back. The decoder then starts anew."""
        rest = self._unclean + self._decode(self._ids)[self._emitted :]
        self._ids, self._emitted, self._unclean = [], 0, ""
        return clean_up_spaces(rest) if self._cleans else rest

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, self._skip) if ids else ""

    def _shorten(self, text: str) -> None:
        """Forget all but the last ids, if the text that follows does not depend on those forgotten.

        What decoding does at the start of a text (drop a space, treat a special token differently) then happens
        to the first kept id, which is why one is kept whose text is out already.
        """
        for keep in range(2, 9):
            tail = self._ids[-keep:]
            head = self._decode(tail[:1])
            if tail[0] in self._backend.added_ids or not head or _REPLACEMENT in head:
                continue
            tail_text = self._decode(tail)
            if tail_text.startswith(head) and text.endswith(tail_text[len(head) :]):
                self._ids, self._emitted = tail, len(tail_text)
                return

    def _clean(self, new: str) -> str:
        if not self._cleans:
            return new
        self._unclean += new
        end = settled_length(self._unclean)
        settled, self._unclean = self._unclean[:end], self._unclean[end:]
        return clean_up_spaces(settled)
