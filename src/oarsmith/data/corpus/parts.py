"""A corpus: its token files, opened; its parts; and a part's samples, mixed and in order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from oarsmith.data.corpus.blend import BlendOrder, Component, parse_blend
from oarsmith.data.corpus.blocks import FileSamples
from oarsmith.data.corpus.cache import IndexCache
from oarsmith.data.corpus.legacy import open_tokens
from oarsmith.data.corpus.part_report import ComponentReport, PartReport
from oarsmith.data.corpus.samples import (
    PARTS,
    Part,
    Piece,
    samples_in,
    split_documents,
)
from oarsmith.data.corpus.stored import StoredTokens
from oarsmith.errors import DataError

_ALL = "; 'split 1' trains on everything and evaluates on nothing"
_TITLES = {"train": "training", "valid": "evaluation", "test": "test"}


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """A sample: [seq_len + 1] int64 tokens and the pieces of documents they are."""

    prefix: Path
    tokens: npt.NDArray[np.int64]
    pieces: tuple[Piece, ...]


class Corpus:
    """The files of a corpus and how their documents are divided.

    Args:
        input_dir: a prefix, a directory or a blend (:func:`oarsmith.data.corpus.blend.parse_blend`).
        shares: of training, evaluation and test; they add up to 1. Every file is divided by them.
        seq_len: trained tokens of a sample.

    Raises:
        DataError: a file that is missing or malformed.
    """

    def __init__(self, input_dir: str, *, shares: Sequence[float], seq_len: int) -> None:
        self.components: tuple[Component, ...] = parse_blend(input_dir)
        self.files: tuple[StoredTokens, ...] = tuple(open_tokens(component.prefix) for component in self.components)
        self.documents = tuple(split_documents(file.num_documents, shares) for file in self.files)
        self.shares = dict(zip(PARTS, shares, strict=True))
        self.seq_len = seq_len

    def num_tokens(self, part: Part) -> list[int]:
        """Tokens of a part in each file."""
        return [
            int(file.document_lengths[documents[part].start : documents[part].stop].sum(dtype=np.int64))
            for file, documents in zip(self.files, self.documents, strict=True)
        ]

    def samples_in_pass(self, part: Part) -> int:
        """Samples that one pass over all files of a part gives."""
        return sum(samples_in(1, num_tokens, self.seq_len) for num_tokens in self.num_tokens(part))

    def highest_id(self, num_pages: int | None = 64) -> tuple[int, str]:
        """The highest token id (see :meth:`StoredTokens.highest_id`) and the file that has it."""
        return max((file.highest_id(num_pages), str(file.prefix)) for file in self.files)

    def require(self, part: Part) -> None:
        """Refuses a part that cannot give a sample.

        Raises:
            DataError: no share, no document, or fewer tokens than a sample in one of the files.
        """
        title = _TITLES[part]
        if self.shares[part] <= 0:
            what = f"the {title} part has no share of the documents"
            raise DataError(what, where="split", fix="give it one, as in 949,50,1, or turn it off")
        for file, documents, num_tokens in zip(self.files, self.documents, self.num_tokens(part), strict=True):
            chosen, needed = documents[part], self.seq_len + 1
            share = f"{self.shares[part]:.3g} of {file.num_documents:,} documents"
            if len(chosen) == 0:
                what = f"the {title} part has no document ({share})"
                fix = f"raise its share in split, or join small files{_ALL}"
                raise DataError(what, where=str(file.prefix), fix=fix)
            if num_tokens < needed:
                what = f"the {title} part has {num_tokens:,} tokens ({share}), a sample {needed:,}"
                fix = f"raise its share in split, lower max_length, or join small files{_ALL}"
                raise DataError(what, where=str(file.prefix), fix=fix)

    def draw(self, part: Part, num_samples: int, *, seed: int, cache: IndexCache | None = None) -> CorpusPart:
        """The first `num_samples` samples of a part.

        Raises:
            DataError: the part cannot give samples, or the cache's index did not come in time.
        """
        assert num_samples > 0, f"{num_samples} samples"
        self.require(part)
        cache = cache or IndexCache()
        order = BlendOrder([component.weight for component in self.components])
        counts = order.counts(num_samples).tolist()
        samples = tuple(
            FileSamples(file, part, documents[part], num_samples=count, seq_len=self.seq_len, seed=seed, cache=cache)
            for file, documents, count in zip(self.files, self.documents, counts, strict=True)
        )
        notes = [note for file in self.files for note in file.notes] + [each.note for each in samples if each.note]
        return CorpusPart(self, part, num_samples, seed, order, samples, tuple(notes))


class CorpusPart:
    """The samples of a part, mixed by weight; made by :meth:`Corpus.draw`.

    Attributes:
        num_samples: how many there are.
        samples_in_pass: how many one pass over the part has.
        seq_len: trained tokens of a sample, which has one token more.
        seed: of the shuffles.
        weights: share of each file.
        fingerprint: sha256 over the files and the documents of the part in each.
    """

    def __init__(
        self,
        corpus: Corpus,
        part: Part,
        num_samples: int,
        seed: int,
        order: BlendOrder,
        samples: tuple[FileSamples, ...],
        notes: tuple[str, ...],
    ) -> None:
        self.part, self.num_samples, self.seed, self.seq_len = part, num_samples, seed, corpus.seq_len
        self.samples_in_pass = corpus.samples_in_pass(part)
        self.weights = [component.weight for component in corpus.components]
        self._corpus, self._order, self._samples, self._notes = corpus, order, samples, notes
        digest = hashlib.sha256()
        for file, documents in zip(corpus.files, corpus.documents, strict=True):
            digest.update(f"{file.fingerprint} {documents[part].start} {documents[part].stop}\n".encode())
        self.fingerprint = digest.hexdigest()

    def row(self, number: int) -> Row:
        """Sample `number`; a pure function of it."""
        if not 0 <= number < self.num_samples:
            raise IndexError(f"sample {number} of {self.num_samples}")
        which, k = self._order.locate(number)
        file = self._corpus.files[which]
        pieces = tuple(self._samples[which].pieces(k))
        tokens = np.empty(self.seq_len + 1, dtype=np.int64)
        at = 0
        for piece in pieces:
            tokens[at : at + piece.length] = file.read_document(piece.document, piece.offset, piece.length)
            at += piece.length
        assert at == self.seq_len + 1, f"sample {number} has {at} tokens"
        return Row(file.prefix, tokens, pieces)

    def report(self) -> PartReport:
        """What the part holds and how often it is drawn."""
        drawn = self._order.counts(self.num_samples).tolist()
        components = []
        for place, (component, file) in enumerate(zip(self._corpus.components, self._corpus.files, strict=True)):
            documents = self._corpus.documents[place][self.part]
            lengths = file.document_lengths[documents.start : documents.stop]
            num_tokens, num_epochs = self._samples[place].num_tokens, self._samples[place].num_epochs
            num_samples = samples_in(num_epochs, num_tokens, self.seq_len)
            components.append(
                ComponentReport(
                    prefix=component.prefix,
                    weight=component.weight,
                    share=drawn[place] / self.num_samples,
                    documents=len(documents),
                    empty=int(np.count_nonzero(lengths == 0)),
                    tokens=num_tokens,
                    samples=drawn[place],
                    epochs=drawn[place] * self.seq_len / num_tokens,
                    left_over=num_epochs * num_tokens - 1 - num_samples * self.seq_len,
                )
            )
        return PartReport(
            part=self.part,
            seq_len=self.seq_len,
            num_samples=self.num_samples,
            components=tuple(components),
            notes=self._notes,
        )
