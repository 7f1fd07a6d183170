"""What is counted, packed and put into batches: documents with loss weights, and prompts with judged answers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Protocol


class Row(Protocol):
    """A ``Sample`` or an ``Answered``; its length is what it takes in a pack."""

    @property
    def where(self) -> str: ...

    @property
    def num_trained(self) -> int: ...

    def __len__(self) -> int: ...

    def content(self) -> Iterator[bytes]:
        """Everything that training on the row follows from, the same on every machine."""
        ...


def fingerprint_of(rows: Sequence[Row]) -> str:
    """sha256 (hexadecimal) over the contents of the rows in order."""
    digest = hashlib.sha256()
    for row in rows:
        for part in row.content():
            digest.update(part)
    return digest.hexdigest()
