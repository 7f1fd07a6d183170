"""The samples of a file in blocks of whole epochs, one of which is held at a time.

So the memory of a run does not grow with its steps, and its start does not wait for samples that are years away.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from oarsmith.data.corpus.cache import IndexCache
from oarsmith.data.corpus.samples import Part, Piece, SampleIndex, build_index, epochs_for, samples_in
from oarsmith.data.corpus.stored import StoredTokens

# Samples or documents of a block, whichever are more; an epoch that has more is a block of its own.
_BLOCK = 1 << 20


class FileSamples:
    """The first `num_samples` samples of a file's part, in their order.

    The first block is there at once, built or waited for as the cache says. Later ones come when they are needed, and
    then no process waits for another: they are not at the same sample, and one may be waiting elsewhere for this one.

    Args:
        documents: those of the part; at least seq_len + 1 tokens.

    Attributes:
        num_tokens: of one epoch.
        num_epochs: needed for so many samples.
        note: what the cache has to say on the first block.

    Raises:
        DataError: the first block did not come in time.
    """

    def __init__(
        self,
        file: StoredTokens,
        part: Part,
        documents: range,
        *,
        num_samples: int,
        seq_len: int,
        seed: int,
        cache: IndexCache,
    ) -> None:
        self.num_tokens = int(file.document_lengths[documents.start : documents.stop].sum(dtype=np.int64))
        self.num_epochs = epochs_for(num_samples, self.num_tokens, seq_len)
        self._file, self._part, self._documents = file, part, documents
        self._seq_len, self._seed, self._cache = seq_len, seed, cache
        self._epochs_per_block = max(1, _BLOCK // max(len(documents), self.num_tokens // seq_len))
        self._block = 0
        self._index, self.note = self._load(0)

    def pieces(self, k: int) -> Iterator[Piece]:
        """The pieces of the k-th sample in order; empty documents give none."""
        epoch = (k + 1) * self._seq_len // self.num_tokens  # that of its last token, before the shuffle and after
        if (block := epoch // self._epochs_per_block) != self._block:
            self._index, _ = self._load(block)
            self._block = block
        first = samples_in(block * self._epochs_per_block, self.num_tokens, self._seq_len)
        return self._index.pieces(k - first, self._file.document_lengths)

    def _load(self, block: int) -> tuple[SampleIndex, str]:
        first = block * self._epochs_per_block
        count = self._epochs_per_block if block else min(self.num_epochs, self._epochs_per_block)
        documents, lengths = self._documents, self._file.document_lengths
        # The content, not the file's name, keys the shuffle: neither does moving a file change it, nor do files of
        # equal length share it.
        purpose = f"{self._part} {self._file.fingerprint}"
        description = "\n".join(
            [
                "GPT Dataset",
                f"data prefix: {self._file.prefix.name}",
                f"fingerprint: {self._file.fingerprint}",
                f"dataset: {self._part}",
                f"documents: {documents.start} to {documents.stop}",
                f"epochs: {first} to {first + count}" if block else f"epochs: {count}",
                f"sequence length: {self._seq_len}",
                f"seed: {self._seed}",
                "index version: 1",
            ]
        )

        def build() -> SampleIndex:
            shape = {"seq_len": self._seq_len, "num_epochs": count, "first_epoch": first}
            return build_index(lengths, documents, **shape, seed=self._seed, purpose=purpose)

        return self._cache.index(self._file.prefix, description, build, wait=block == 0)
