"""Batches of corpus samples, and a place in them that is two numbers.

Shape suffixes: R rows of a batch, L inputs of a row, T = R L.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from oarsmith.data.batch import Batch, assemble
from oarsmith.data.corpus.parts import CorpusPart, Row
from oarsmith.data.place import PlacedBatches
from oarsmith.errors import ConfigError, DataError

Ids = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float32]


class CorpusLoader(PlacedBatches):
    """Batches of `rows_per_batch` samples end to end, in the order of the part; none of them is ever padded or short.

    An epoch is as many samples as one pass over the part has, in whole batches. Epochs follow each other without a
    border: batch p of epoch e is number e x batches_per_epoch + p of all. The files of a blend are passed through each
    at its own rate, so in an epoch a file with a large weight may be seen twice and another one in part.

    Args:
        isolate_documents: a row is cut where its documents meet: they cannot see each other, positions begin anew, and
            the last token of a document is not trained to predict the next document's first. False: a row is one
            stream, as in GPT-2, GPT-3 and Megatron.
        vocab_size: a token at or above it is an error.
        opening: see :func:`make_corpus_batch`.

    Raises:
        ConfigError: no rows.
    """

    def __init__(
        self,
        part: CorpusPart,
        *,
        rows_per_batch: int,
        isolate_documents: bool,
        vocab_size: int | None = None,
        opening: Sequence[int] = (),
    ) -> None:
        if rows_per_batch < 1:
            what = f"rows per batch is {rows_per_batch}, at least 1 is needed"
            raise ConfigError(what, where="per_device_train_batch_size")
        super().__init__(part.fingerprint)
        self._part = part
        self._rows_per_batch = rows_per_batch
        self._isolate = isolate_documents
        self._vocab_size = vocab_size
        self._opening = tuple(opening)

    def batches_per_epoch(self, epoch: int = 0) -> int:
        """Number of batches of an epoch, the same for all."""
        return batches_in_pass(self._part.samples_in_pass, self._rows_per_batch)

    def batch_at(self, epoch: int, index: int) -> Batch:
        """Batch `index` of an epoch; a pure function of the arguments."""
        count = self.batches_per_epoch(epoch)
        if not 0 <= index < count:
            raise IndexError(f"batch {index} of {count}")
        first = (epoch * count + index) * self._rows_per_batch
        return make_corpus_batch(
            [self._part.row(number) for number in range(first, first + self._rows_per_batch)],
            isolate_documents=self._isolate,
            vocab_size=self._vocab_size,
            opening=self._opening,
        )

    def _settings(self) -> dict[str, Any]:
        """The number of samples is not among it: a run that was planned longer or shorter goes on."""
        return {
            "seed": self._part.seed,
            "weights": self._part.weights,
            "max_length": self._part.seq_len,
            "rows_per_batch": self._rows_per_batch,
            "isolate_documents": self._isolate,
        }


def batches_in_pass(samples_in_pass: int, rows_per_batch: int) -> int:
    """Whole batches of one pass, at least 1: where a pass is less than a batch, the batch goes on with the next one."""
    return max(1, samples_in_pass // rows_per_batch)


def evaluation_batches(
    part: CorpusPart,
    *,
    rows_per_batch: int,
    isolate_documents: bool,
    vocab_size: int | None = None,
    opening: Sequence[int] = (),
) -> Callable[[], Iterator[Batch]]:
    """All samples of a part, the same and in the same order at every call; the last batch may have fewer rows."""

    def batches() -> Iterator[Batch]:
        for first in range(0, part.num_samples, rows_per_batch):
            numbers = range(first, min(first + rows_per_batch, part.num_samples))
            yield make_corpus_batch(
                [part.row(number) for number in numbers],
                isolate_documents=isolate_documents,
                vocab_size=vocab_size,
                opening=opening,
            )

    return batches


def make_corpus_batch(
    rows: Sequence[Row], *, isolate_documents: bool, vocab_size: int | None = None, opening: Sequence[int] = ()
) -> Batch:
    """The rows end to end: inputs are all tokens of a row but the last, targets all but the first.

    Args:
        opening: ids to put in front of every row (of every document where they are apart), for models that generate
            after certain tokens only. The last one is trained to predict the first token behind it.

    Raises:
        DataError: a token outside the vocabulary, or documents of one token only that are kept apart: nothing to train.
    """
    tokens_RS = np.stack([row.tokens for row in rows])
    if vocab_size is not None and (tokens_RS.max() >= vocab_size or tokens_RS.min() < 0):
        raise _outside(rows, vocab_size)
    seq_len = tokens_RS.shape[1] - 1
    targets_T = tokens_RS[:, 1:].flatten()
    weights_T = np.ones(len(targets_T), dtype=np.float32)
    bounds, where = [0], []
    for number, row in enumerate(rows):
        start = number * seq_len
        if not isolate_documents:
            documents = ", ".join(str(piece.document) for piece in row.pieces)
            where.append(f"{row.prefix}: {'document' if len(row.pieces) == 1 else 'documents'} {documents}")
            bounds.append(start + seq_len)
            continue
        at = 0
        for piece in row.pieces:
            if at > 0:
                targets_T[start + at - 1] = 0
                weights_T[start + at - 1] = 0
            if at < seq_len:
                where.append(f"{row.prefix}: document {piece.document} from token {piece.offset}")
                bounds.append(start + min(at + piece.length, seq_len))
            at += piece.length
    if not weights_T.any():
        what = "all documents of a batch have one token, and none may see another: nothing can be trained"
        raise DataError(what, where=where[0], fix="set isolate_documents to false, or leave out such documents")
    parts = (tokens_RS[:, :-1].flatten(), targets_T, weights_T, np.asarray(bounds, dtype=np.int64))
    inputs_T, targets_T, weights_T, borders = _opened(*parts, np.asarray(opening, dtype=np.int64)) if opening else parts
    return assemble(inputs_T, targets_T, weights_T, bounds=borders, where=tuple(where))


def _opened(ids_T: Ids, targets_T: Ids, weights_T: Weights, bounds: Ids, opening: Ids) -> tuple[Ids, Ids, Weights, Ids]:
    """The same with ``opening`` in front of every document."""
    starts, num = bounds[:-1], len(bounds) - 1
    at = np.repeat(starts, len(opening))
    following = np.column_stack([np.tile(opening[1:], (num, 1)), ids_T[starts]])
    trained = np.tile(np.arange(len(opening)) == len(opening) - 1, num).astype(np.float32)
    return (
        np.insert(ids_T, at, np.tile(opening, num)),
        np.insert(targets_T, at, following.ravel()),
        np.insert(weights_T, at, trained),
        bounds + len(opening) * np.arange(num + 1),
    )


def _outside(rows: Sequence[Row], vocab_size: int) -> DataError:
    for row in rows:
        at = 0
        for piece in row.pieces:
            tokens = row.tokens[at : at + piece.length]
            wrong = np.flatnonzero((tokens >= vocab_size) | (tokens < 0))
            if len(wrong):
                place = f"{row.prefix}: document {piece.document}, token {piece.offset + int(wrong[0])}"
                what = f"token id {tokens[wrong[0]]} is outside the model's vocabulary of {vocab_size:,}"
                return DataError(what, where=place, fix="make the corpus with the tokenizer of this model")
            at += piece.length
    raise AssertionError("every token is inside")
