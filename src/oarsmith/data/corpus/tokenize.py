"""Texts to ids, many at a time: through tiktoken where `fast_bpe` allows it, else through the tokenizer itself.

Both give the same ids. A worker that meets no text it has to leave to the tokenizer never loads it.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from oarsmith.data.corpus.fast_bpe import NO_TOKEN, NOT_COMPARED, FastPlan, is_composed
from oarsmith.text import Tokenizer, load_tokenizer

Ids = npt.NDArray[np.integer]

# Longer texts go through the slower of tiktoken's two entries, which raises where white space by the million overflows
# its stack; the faster one panics.
_LONG = 100_000


@dataclass(frozen=True)
class Encoding:
    """How documents become ids.

    Args:
        tokenizer: its directory.
        dtype: of the ids in the token file, as numpy writes it.
        eos: id that ends every document, None for no such id.
        add_special_tokens: what `Tokenizer.encode` puts around a text.
        fast: None leaves everything to the tokenizer.
    """

    tokenizer: str
    dtype: str
    eos: int | None
    add_special_tokens: bool
    fast: FastPlan | None


class Encoder:
    """An `Encoding` at work. `num_slow` counts the texts that a fast plan had to leave to the tokenizer."""

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._fast = None if encoding.fast is None else _Fast(encoding.fast)
        self.num_slow = 0

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self._encoding.tokenizer)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text, eos at its end where that is wanted and the tokenizer has not put it there."""
        found: list[Ids | None] = [None if self._fast is None else self._fast.encode(text) for text in texts]
        left = [index for index, ids in enumerate(found) if ids is None]
        if left:
            if self._fast is not None:
                self.num_slow += len(left)
            slow = self._tokenizer.encode_batch([texts[index] for index in left], self._encoding.add_special_tokens)
            for index, ids in zip(left, slow, strict=True):
                found[index] = np.array(ids, dtype=np.int64)
        return [self._ended(ids) for ids in found if ids is not None]

    def _ended(self, ids: Ids) -> Ids:
        eos = self._encoding.eos
        if eos is not None and (len(ids) == 0 or ids[-1] != eos):
            return np.append(ids, ids.dtype.type(eos))
        return ids


class _Fast:
    def __init__(self, plan: FastPlan) -> None:
        self._plan = plan
        self._encoding = plan.encoding()
        self._id_of_rank = np.array(plan.ids, dtype=np.int32)
        self._prefix = np.array(plan.prefix, dtype=np.int32)
        self._suffix = np.array(plan.suffix, dtype=np.int32)
        self._unsafe = re.compile(f"[{re.escape(plan.unsafe)}{NOT_COMPARED}]")
        self._first_unsafe = min(map(ord, plan.unsafe), default=0x10000)
        self._added = None if plan.added is None else re.compile(plan.added)

    def encode(self, text: str) -> Ids | None:
        """The ids, or None for a text to leave to the tokenizer."""
        if self._added is not None and self._added.search(text):
            return None
        if not text.isascii() and (self._is_unsafe(text) or (self._plan.composes and not is_composed(text))):
            return None
        if len(text) < _LONG:
            ranks = self._encoding.encode_ordinary(text)
        else:
            try:
                ranks = self._encoding.encode(text, allowed_special=set(), disallowed_special=())
            except ValueError:
                return None
        ids = self._id_of_rank[np.frombuffer(array("I", ranks), dtype=np.uint32)] if ranks else self._id_of_rank[:0]
        if len(ids) and ids.min() == NO_TOKEN:
            return None
        if len(self._prefix) or len(self._suffix):
            return np.concatenate([self._prefix, ids, self._suffix])
        return ids

    def _is_unsafe(self, text: str) -> bool:
        # Where only characters beyond the first plane are unsafe, UTF-16 shows that a text has none, many times as fast
        # as the expression.
        if self._first_unsafe >= 0x10000 and len(text.encode("utf-16-le")) == 2 * len(text):
            return False
        return self._unsafe.search(text) is not None


def disagreement(encoding: Encoding, tokenizer: Tokenizer, texts: Sequence[str]) -> str | None:
    """The first of these texts whose ids are not those of the tokenizer itself: None, or the proof has a hole."""
    encoder = Encoder(replace(encoding, eos=None))
    for text, ids in zip(texts, encoder.encode(texts), strict=True):
        if tokenizer.encode(text, encoding.add_special_tokens) != ids.tolist():
            return text
    return None
