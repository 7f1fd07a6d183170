"""Random numbers of a request. No PyTorch here."""

from __future__ import annotations

import hashlib


class Draws:
    """Numbers in [0, 1) that follow from a name and their place alone: the third one is the third one anywhere."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self._key = hashlib.blake2b(name.encode(), digest_size=32).digest()

    def next(self) -> float:
        """The next number: 53 bits, as many as a float has."""
        digest = hashlib.blake2b(self.count.to_bytes(8, "little"), key=self._key, digest_size=8).digest()
        self.count += 1
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
