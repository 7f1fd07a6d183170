"""The account of preprocessing: documents read, kept and left out with reasons and places, tokens, speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from oarsmith.data.corpus.shard import Counts, Shard
from oarsmith.data.report import DropReason


@dataclass(slots=True)
class Account:
    """What became of a corpus.

    Attributes:
        files, ignored: corpus files; files of the directories that are of no known type.
        input_bytes: size of the files on disk.
        documents: documents found, those left out included.
        left_out: the ones that are not in the output, by reason.
        collapsed: kept documents in which a long run of one character was collapsed.
        text_bytes, encoded_tokens: UTF-8 bytes and tokens of the kept documents before duplicates went.
        slow: texts that fast encoding left to the tokenizer.
        longest: tokens and place of the longest document before duplicates went.
        seconds, done_bytes: time of this process, and the input it went through (a continued job had done the rest).
    """

    files: int
    ignored: DropReason
    input_bytes: int
    dtype: str
    documents: int = 0
    blank: int = 0
    kept: int = 0
    left_out: dict[str, DropReason] = field(default_factory=dict)
    collapsed: int = 0
    tokens: int = 0
    encoded_tokens: int = 0
    text_bytes: int = 0
    slow: int = 0
    longest: tuple[int, str] = (0, "")
    seconds: float = 0.0
    done_bytes: int = 0

    def add(self, shard: Shard, counts: Counts, places_before: int) -> None:
        """Adds a shard. `places_before`: lines or rows of its file in front of it."""
        self.documents += counts.documents
        self.blank += counts.blank
        self.kept += counts.kept
        self.collapsed += counts.collapsed
        self.tokens += counts.tokens
        self.encoded_tokens += counts.tokens
        self.text_bytes += counts.text_bytes
        self.slow += counts.slow
        if counts.longest[0] > self.longest[0]:
            self.longest = counts.longest[0], shard.piece.where(counts.longest[1] + places_before)
        for reason, gone in counts.gone.items():
            total = self.left_out.setdefault(reason, DropReason())
            for place, detail in gone.examples:
                where = shard.piece.where(place + places_before)
                total.add(f"{where} ({detail})" if detail else where)
            total.count += gone.count - len(gone.examples)

    def remove(self, reason: str, where: str, num_tokens: int) -> None:
        """Moves a kept document to those left out."""
        self.left_out.setdefault(reason, DropReason()).add(where)
        self.kept -= 1
        self.tokens -= num_tokens

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text a token stands for."""
        return self.text_bytes / self.encoded_tokens if self.encoded_tokens else 0.0

    @property
    def mb_per_second(self) -> float:
        """Megabytes of input a second, by this process."""
        return self.done_bytes / 1e6 / self.seconds if self.seconds else 0.0

    def reasons(self) -> list[str]:
        """Why documents are not in the output, the most frequent reason first, with an example."""
        ordered = sorted(self.left_out.items(), key=lambda item: -item[1].count)
        return [f"{gone.count:,} x {reason}, such as {gone.examples[0]}" for reason, gone in ordered]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "files": self.files,
            "ignored_files": {"count": self.ignored.count, "examples": self.ignored.examples},
            "input_bytes": self.input_bytes,
            "documents": self.documents,
            "blank_lines": self.blank,
            "kept": self.kept,
            "left_out": {name: {"count": r.count, "examples": r.examples} for name, r in self.left_out.items()},
            "collapsed_runs": self.collapsed,
            "tokens": self.tokens,
            "dtype": self.dtype,
            "bytes_per_token": round(self.bytes_per_token, 4),
            "longest": {"tokens": self.longest[0], "where": self.longest[1]},
            "left_to_tokenizer": self.slow,
            "seconds": round(self.seconds, 3),
            "mb_per_second": round(self.mb_per_second, 3),
        }

    def lines(self) -> list[str]:
        """The account as a few lines of text."""
        left_out = sum(gone.count for gone in self.left_out.values())
        found = [
            f"{self.documents:,} documents read from {self.files:,} files ({self.input_bytes / 1e6:,.1f} MB), "
            f"{self.kept:,} kept, {left_out:,} left out",
            f"{self.tokens:,} tokens as {self.dtype}, {self.bytes_per_token:.2f} bytes of text a token; "
            f"the longest document has {self.longest[0]:,} ({self.longest[1]})",
        ]
        found += [f"left out: {reason}" for reason in self.reasons()]
        if self.collapsed:
            found.append(f"{self.collapsed:,} documents had long runs of one character, which were collapsed")
        if self.ignored.count:
            found.append(f"ignored: {self.ignored.count:,} files of other types, such as {self.ignored.examples[0]}")
        found.append(f"{self.seconds:.1f} s, {self.mb_per_second:.1f} MB/s")
        return found


def places_before(shards: Sequence[Shard], counts: Sequence[Counts]) -> list[int]:
    """For each shard the lines or rows of its file that lie in front of it; the shards are in order."""
    found: list[int] = []
    file, before = "", 0
    for shard, own in zip(shards, counts, strict=True):
        if shard.piece.path != file:
            file, before = shard.piece.path, 0
        found.append(before)
        before += own.places
    return found
