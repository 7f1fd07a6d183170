"""What became of the rows: read, kept, cut, left out and why, and how many tokens are trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from oarsmith.data.packs import best_fit_packs, packing_efficiency
from oarsmith.data.rows import Row
from oarsmith.errors import DataError

_MAX_EXAMPLES = 3
_PERCENTILES = (0, 10, 25, 50, 75, 90, 99, 100)


@dataclass(slots=True)
class DropReason:
    """Rows left out for one reason: how many, and the first few of them as "file:line (detail)"."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        """Counts one row."""
        self.count += 1
        if len(self.examples) < _MAX_EXAMPLES:
            self.examples.append(example)


@dataclass(slots=True)
class DataReport:
    """The account of one data source.

    Attributes:
        rows: rows read, malformed ones included; blank lines not.
        kept: rows that gave at least one sample.
        dropped: rows that gave none, by reason.
        notes: what was done to kept rows (cut, split, left untrained) -> how often.
        lengths: tokens of the samples at the percentiles 0, 10, 25, 50, 75, 90, 99, 100.
        packing: share of rows of max_length that packing fills, 0 to 1.
    """

    source: str
    max_length: int
    rows: int = 0
    blank: int = 0
    malformed: DropReason = field(default_factory=DropReason)
    kept: int = 0
    dropped: dict[str, DropReason] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    num_samples: int = 0
    num_tokens: int = 0
    num_trained: int = 0
    lengths: dict[int, int] = field(default_factory=dict)
    packing: float = 0.0

    def drop(self, reason: str, where: str, detail: str) -> None:
        """Counts a row that gave no sample."""
        self.dropped.setdefault(reason, DropReason()).add(f"{where} ({detail})" if detail else where)

    def keep(self, samples: Sequence[Row], notes: Mapping[str, int]) -> None:
        """Counts a row and its samples."""
        self.kept += 1
        self.notes.update(notes)
        self.num_samples += len(samples)
        self.num_tokens += sum(map(len, samples))
        self.num_trained += sum(sample.num_trained for sample in samples)

    def finish(self, sizes: Sequence[int]) -> None:
        """Adds what is known only at the end: lengths and packing, from the tokens that each sample takes."""
        if sizes:
            points = np.percentile(sizes, _PERCENTILES, method="nearest")
            self.lengths = {at: int(size) for at, size in zip(_PERCENTILES, points, strict=True)}
            self.packing = packing_efficiency(sizes, best_fit_packs(sizes, self.max_length), self.max_length)

    @property
    def num_left_out(self) -> int:
        """Rows that gave no sample, malformed ones included."""
        return self.malformed.count + sum(reason.count for reason in self.dropped.values())

    def check(self, max_dropped_fraction: float) -> None:
        """Refuses data that cannot train or that lost too much.

        Raises:
            DataError: no rows, no trained tokens, or more than the given share of rows left out; it lists the reasons.
        """
        if self.rows == 0:
            raise DataError("no rows in the data", where=self.source, fix="check that the file is the right one")
        why = "; ".join(self._reasons())
        if self.num_trained == 0:
            what = f"no token would be trained: {self.rows} rows read, {self.kept} kept"
            raise DataError(
                f"{what}. {why}" if why else what,
                where=self.source,
                fix="`oarsmith preview` shows rows with their loss",
            )
        share = self.num_left_out / self.rows
        if share > max_dropped_fraction:
            what = f"{self.num_left_out} of {self.rows} rows ({share:.0%}) were left out"
            raise DataError(
                f"{what}, the limit is {max_dropped_fraction:.0%}. {why}",
                where=self.source,
                fix="repair the rows, or raise max_dropped_fraction if this is meant",
            )

    def _reasons(self) -> list[str]:
        named = [(reason, found) for reason, found in self.dropped.items()]
        if self.malformed.count:
            named.append(("malformed", self.malformed))
        named.sort(key=lambda item: -item[1].count)
        return [f"{found.count} x {reason}, such as {found.examples[0]}" for reason, found in named]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "source": self.source,
            "max_length": self.max_length,
            "rows": self.rows,
            "blank_lines": self.blank,
            "malformed": {"count": self.malformed.count, "examples": self.malformed.examples},
            "kept": self.kept,
            "dropped": {name: {"count": r.count, "examples": r.examples} for name, r in self.dropped.items()},
            "notes": dict(self.notes),
            "samples": self.num_samples,
            "tokens": self.num_tokens,
            "trained_tokens": self.num_trained,
            "length_percentiles": {str(at): size for at, size in self.lengths.items()},
            "packing_efficiency": round(self.packing, 4),
        }

    def lines(self) -> list[str]:
        """The report as a few lines of text."""
        trained = self.num_trained / self.num_tokens if self.num_tokens else 0.0
        found = [
            f"{self.source}: {self.rows:,} rows read, {self.kept:,} kept, {self.num_left_out:,} left out"
            + (f", {self.blank:,} blank lines" if self.blank else ""),
            f"{self.num_samples:,} samples, {self.num_tokens:,} tokens, {self.num_trained:,} trained ({trained:.0%})",
        ]
        if self.lengths:
            middle, high, longest = self.lengths[50], self.lengths[90], self.lengths[100]
            found.append(
                f"tokens a sample: median {middle:,}, 90 % within {high:,}, longest {longest:,} "
                f"(limit {self.max_length:,}); packing fills {self.packing:.1%}"
            )
        found += [f"left out: {reason}" for reason in self._reasons()]
        found += [f"{count:,} x {note}" for note, count in self.notes.most_common()]
        return found
