"""From documents to samples of seq_len + 1 tokens.

The documents of a part (training, validation, test) are laid end to end in a shuffled order, epoch after epoch, and cut
every L = seq_len tokens: sample s is the tokens s L to s L + L of that stream, so neighbours share one token, which is
the last target of one and the first input of the next. With T tokens an epoch, E epochs hold (E T - 1) // L samples. A
sample belongs to the epoch in which its last token lies, and samples are shuffled within their epoch.

This is the construction of Megatron-LM (``megatron/core/datasets/gpt_dataset.py``) but for one thing: Megatron shuffles
all epochs together, and the last one apart only where less than 80 % of it is needed. Here every epoch is shuffled
apart. So the k-th sample does not depend on how many are asked for: a run with more steps sees the same samples first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from oarsmith.data.corpus.stored import Array
from oarsmith.data.order import permutation

Part = Literal["train", "valid", "test"]
PARTS: tuple[Part, ...] = ("train", "valid", "test")


def split_documents(num_documents: int, shares: Sequence[float]) -> dict[Part, range]:
    """Consecutive documents for each part.

    Every part gets round(share x documents), halves to even, and the first part with a share bears what rounding
    leaves over or takes too much, as in Megatron. A part without a share gets no document.

    Args:
        shares: of training, validation, test; they add up to 1.
    """
    counts = [round(share * num_documents) for share in shares]
    first = next(index for index, share in enumerate(shares) if share > 0)
    counts[first] += num_documents - sum(counts)
    assert len(shares) == len(PARTS) and min(counts) >= 0, f"{num_documents} documents in shares of {shares}: {counts}"
    borders = np.cumsum([0, *counts]).tolist()
    return {part: range(borders[index], borders[index + 1]) for index, part in enumerate(PARTS)}


def samples_in(num_epochs: int, num_tokens: int, seq_len: int) -> int:
    """Samples that end within the first epochs of `num_tokens` tokens each."""
    return max(0, (num_epochs * num_tokens - 1) // seq_len)


def epochs_for(num_samples: int, num_tokens: int, seq_len: int) -> int:
    """The least number of epochs, at least 1, that holds so many samples."""
    return max(1, -(-(num_samples * seq_len + 1) // num_tokens))


@dataclass(frozen=True, slots=True)
class Piece:
    """`length` tokens of a document from token `offset` on."""

    document: int
    offset: int
    length: int


@dataclass(frozen=True, eq=False)
class SampleIndex:
    """Which tokens a sample is.

    Attributes:
        doc_idx: [epochs x documents] the documents of the stream; int32, or int64 for more than 2^31.
        sample_idx: [samples + 1, 2] (place in doc_idx, token in that document) of every cut. Sample s is the tokens
            from cut s to cut s + 1, both included.
        shuffle_idx: [samples] the number in the stream of the k-th sample; uint32, or int64.
    """

    doc_idx: Array
    sample_idx: Array
    shuffle_idx: Array

    def __len__(self) -> int:
        return len(self.shuffle_idx)

    def pieces(self, k: int, document_lengths: Array) -> Iterator[Piece]:
        """The pieces of the k-th sample in order; empty documents give none."""
        number = int(self.shuffle_idx[k])
        (first, start), (last, end) = self.sample_idx[number : number + 2].tolist()
        for place in range(first, last + 1):
            document = int(self.doc_idx[place])
            stop = end + 1 if place == last else int(document_lengths[document])
            if stop > start:
                yield Piece(document, start, stop - start)
            start = 0


def build_index(
    document_lengths: Array,
    documents: range,
    *,
    seq_len: int,
    num_epochs: int,
    first_epoch: int = 0,
    seed: int,
    purpose: str,
) -> SampleIndex:
    """All samples of `num_epochs` epochs from `first_epoch` on; those of fewer epochs are the beginning of it.

    Args:
        document_lengths: tokens of every document of the file.
        documents: those of the part.
        purpose: keys the shuffles beside the seed.
    """
    lengths = document_lengths[documents.start : documents.stop]
    num_tokens = int(lengths.sum(dtype=np.int64))
    last_epoch = first_epoch + num_epochs
    before = samples_in(first_epoch, num_tokens, seq_len)
    num_samples = samples_in(last_epoch, num_tokens, seq_len) - before
    assert num_samples > 0, f"{num_epochs} x {num_tokens} tokens for samples of {seq_len}"
    stream_epoch = before * seq_len // num_tokens  # where the first sample begins, perhaps an epoch before it ends
    order = np.concatenate(
        [permutation(len(documents), seed, f"documents {purpose}", epoch) for epoch in range(stream_epoch, last_epoch)]
    )
    starts = np.zeros(len(order) + 1, dtype=np.int64)
    np.cumsum(lengths[order], out=starts[1:])
    cuts = np.arange(before, before + num_samples + 1, dtype=np.int64) * seq_len - stream_epoch * num_tokens
    # The last document that starts at or before the cut: of empty ones in its place it is the one behind them.
    places = np.searchsorted(starts, cuts, side="right") - 1
    sample_idx = np.stack([places, cuts - starts[places]], axis=1)
    shuffle_idx = np.empty(num_samples, dtype=np.uint32 if num_samples < 2**32 else np.int64)
    for epoch in range(first_epoch, last_epoch):
        first, stop = (samples_in(end, num_tokens, seq_len) - before for end in (epoch, epoch + 1))
        shuffle_idx[first:stop] = permutation(stop - first, seed, f"samples {purpose}", epoch) + first
    return SampleIndex(
        doc_idx=_narrow(order + documents.start), sample_idx=_narrow(sample_idx), shuffle_idx=shuffle_idx
    )


def _narrow(values: Array) -> Array:
    return values.astype(np.int32) if values.max() < 2**31 else values
