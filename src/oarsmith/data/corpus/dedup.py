"""Duplicates: documents of the same text, and documents of nearly the same words (MinHash with banding).

Workers compute a signature a document; afterwards one process looks at all signatures in the order of the documents.
A document goes if an earlier one *that stays* is the same, so each that goes has a twin in the corpus, and the outcome
depends on the order of the documents alone.

MinHash: Broder, "On the resemblance and containment of documents" (1997). Hash function i keeps the smallest hash of a
document's shingles; two documents agree in it with the probability of their Jaccard similarity J = |A ∩ B| / |A ∪ B|.
The share of agreeing places estimates J with a standard deviation of sqrt(J (1 - J) / num_perm). Candidates share a
band of r places (Leskovec, Rajaraman, Ullman, "Mining of massive datasets", section 3.4); the estimate decides.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from hashlib import blake2b
from typing import Literal

import numpy as np
import numpy.typing as npt

Kind = Literal["none", "exact", "minhash"]
Signatures = npt.NDArray[np.integer]

SHINGLE = 5
# Words; scripts without spaces between words go character by character.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORDS = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_BLOCK = 1024  # shingles times num_perm words of 8 bytes: a block stays in the cache
_RECALL = 0.99
_MAX_CACHED_WORDS = 1 << 20


@dataclass(frozen=True)
class Dedup:
    """Which documents count as the same.

    Args:
        kind: exact: the same text but for case and white space. minhash: also nearly the same words.
        threshold: for minhash, the Jaccard similarity of shingles of 5 words from which on two documents are the same.
        num_perm: hash functions of minhash.
    """

    kind: Kind = "none"
    threshold: float = 0.8
    num_perm: int = 128

    @property
    def rows(self) -> int:
        """Places of a band: the most with which documents at the threshold still share a band in 99 of 100 cases."""
        fits = (r for r in range(self.num_perm, 1, -1) if self._recall(r) >= _RECALL)
        return next(fits, 1)

    def _recall(self, rows: int) -> float:
        return 1 - (1 - self.threshold**rows) ** (self.num_perm // rows)


@dataclass
class Signer:
    """Signatures of texts: 16 bytes of a hash as uint64 [N, 2], or uint32 [N, num_perm] of minhash."""

    dedup: Dedup
    _hashes: dict[str, int] = field(default_factory=dict)

    def __call__(self, texts: Sequence[str]) -> Signatures:
        """[N, width] for N texts."""
        if self.dedup.kind == "exact":
            digests = (blake2b(normalised(text).encode("utf-8"), digest_size=16).digest() for text in texts)
            return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)
        assert self.dedup.kind == "minhash", self.dedup
        rows = [self._minhash(text) for text in texts]
        return np.stack(rows) if rows else np.empty((0, self.dedup.num_perm), np.uint32)

    def _minhash(self, text: str) -> npt.NDArray[np.uint32]:
        shingles = self.shingles(text)
        factors, terms = self._functions
        smallest = np.full(self.dedup.num_perm, np.iinfo(np.uint32).max, np.uint32)
        for start in range(0, len(shingles), _BLOCK):
            hashed = (factors[:, None] * shingles[start : start + _BLOCK] + terms[:, None]) >> np.uint64(32)
            np.minimum(smallest, hashed.min(axis=1).astype(np.uint32), out=smallest)
        return smallest

    @cached_property
    def _functions(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """Multiply-shift (Dietzfelbinger and others, 1997): odd factors and terms, fixed for all times."""
        numbers = [_hash(f"oarsmith minhash {index}") for index in range(2 * self.dedup.num_perm)]
        halves = np.array(numbers, dtype=np.uint64).reshape(2, -1)
        return halves[0] | np.uint64(1), halves[1]

    def shingles(self, text: str) -> npt.NDArray[np.uint64]:
        """Hashes of the distinct runs of 5 words; of the whole text where it has fewer."""
        words = np.array([self._word(word) for word in words_of(text)], dtype=np.uint64)
        num = max(len(words) - SHINGLE + 1, 1)
        total = np.zeros(num, np.uint64)
        for place in range(min(SHINGLE, len(words))):
            total = total * np.uint64(0x9E3779B97F4A7C15) + words[place : place + num]
        return np.unique(_mixed(total))

    def _word(self, word: str) -> int:
        found = self._hashes.get(word)
        if found is None:
            if len(self._hashes) >= _MAX_CACHED_WORDS:
                self._hashes.clear()
            found = self._hashes[word] = _hash(word)
        return found


def normalised(text: str) -> str:
    """What exact duplicates have in common: the text in lower case, every run of white space one space."""
    return " ".join(text.lower().split())


def words_of(text: str) -> list[str]:
    """The words that shingles are made of."""
    return _WORDS.findall(text.lower())


@lru_cache(maxsize=1024)
def _hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode("utf-8"), digest_size=8).digest(), "little")


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of MurmurHash3: every bit of the sum decides every bit of the hash."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        values = (values ^ (values >> np.uint64(33))) * np.uint64(factor)
    return values ^ (values >> np.uint64(33))


def find_duplicates(parts: Sequence[Signatures], dedup: Dedup) -> npt.NDArray[np.bool_]:
    """[documents] which of the documents go, from their signatures in the order of the corpus.

    Memory grows with the number of documents: 40 bytes each for exact, some 20 words a band for minhash (the signatures
    themselves stay in their files).
    """
    if dedup.kind == "exact":
        return _exact(np.concatenate(parts)) if parts else np.zeros(0, np.bool_)
    return _near(parts, dedup)


def _exact(digests: Signatures) -> npt.NDArray[np.bool_]:
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: among equals the earliest comes first
    ordered = digests[order]
    gone = np.zeros(len(digests), np.bool_)
    gone[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
    return gone


def _near(parts: Sequence[Signatures], dedup: Dedup) -> npt.NDArray[np.bool_]:
    starts = np.cumsum([0, *map(len, parts)])
    bands = np.concatenate([_bands(part, dedup) for part in parts]) if parts else np.empty((0, 1), np.uint64)
    shared = np.zeros(len(bands), np.bool_)
    for column in bands.T:
        _, where, counts = np.unique(column, return_inverse=True, return_counts=True)
        shared |= counts[where] > 1

    def signature(document: int) -> Signatures:
        part = int(np.searchsorted(starts, document, side="right")) - 1
        return parts[part][document - int(starts[part])]

    gone = np.zeros(len(bands), np.bool_)
    kept: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for document in np.flatnonzero(shared).tolist():
        keys = list(enumerate(bands[document].tolist()))
        earlier = sorted({other for key in keys for other in kept.get(key, ())})
        own = signature(document)
        if any(np.mean(own == signature(other)) >= dedup.threshold for other in earlier):
            gone[document] = True
            continue
        for key in keys:
            kept[key].append(document)
    return gone


def _bands(signatures: Signatures, dedup: Dedup) -> npt.NDArray[np.uint64]:
    """[N, bands] a hash of the places of each band."""
    rows = dedup.rows
    num_bands = dedup.num_perm // rows
    cut = np.asarray(signatures[:, : num_bands * rows], dtype=np.uint64).reshape(len(signatures), num_bands, rows)
    total = np.zeros(cut.shape[:2], np.uint64)
    for place in range(rows):
        total = _mixed(total * np.uint64(0x9E3779B97F4A7C15) + cut[:, :, place])
    return total
