"""What a policy is asked, in an order that (seed, pass over the data) alone decide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from oarsmith.data.order import permutation


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """One prompt.

    Attributes:
        ids: of its tokens; ``text``: what they spell.
        row: the data set's row, for rewards.
        where: file:line.
        messages: that it was rendered from, for environments.
    """

    ids: tuple[int, ...]
    text: str
    row: Mapping[str, object]
    where: str
    messages: tuple[Mapping[str, Any], ...] = ()

    @property
    def num_trained(self) -> int:
        """None of a prompt's own tokens are."""
        return 0

    def __len__(self) -> int:
        return len(self.ids)

    def content(self) -> Iterator[bytes]:
        """Tokens, and the row that rewards look at."""
        yield np.asarray(self.ids, dtype="<i4").tobytes()
        yield repr(sorted(self.row.items(), key=lambda item: item[0])).encode("utf-8", "surrogatepass")


class PromptOrder:
    """Prompts one after the other without end; each pass over all of them has an order of its own."""

    def __init__(self, prompts: Sequence[Asked], seed: int) -> None:
        self._prompts, self._seed = prompts, seed
        self._known: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return len(self._prompts)

    def take(self, first: int, count: int) -> list[Asked]:
        """``count`` prompts from number ``first`` on."""
        return [self._at(number) for number in range(first, first + count)]

    def _at(self, number: int) -> Asked:
        turn, place = divmod(number, len(self._prompts))
        if self._known[0] != turn:
            self._known = turn, permutation(len(self._prompts), self._seed, "prompts", turn).tolist()
        return self._prompts[self._known[1][place]]
