"""Prompts with answers that are judged: pairs of a preference, single answers, and batches of them.

A prompt lies in a batch once, its answers behind it; each answer continues the prompt as if the others were not there.
Shapes: T tokens of the batch, E tokens of the whole documents (prompt and answer), N predicted tokens, A answers,
S judged steps of answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from oarsmith.data.batch import Batch

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """A prompt and its answers, the better one first where they are a pair.

    Attributes:
        prompt: int32 ids, at least one.
        answers: int32 ids of each, at least one.
        labels: of each answer, what the data says of it: 1 good, 0 bad, nan nothing (it belongs to another prompt, or
            its steps are judged instead).
        margin: how much better the first one is, where the data says so.
        reference: of each answer, its log-probability under the reference model; () until it is known.
        where: file:line of the row.
        spoken: of each answer, bool: which of its tokens are predicted; not what tools and users say between an
            assistant's messages. (): all of them.
        step_ends, step_labels: of the only answer, the index of each step's last token, and how good the step is, from
            0 to 1 (a process reward).
    """

    prompt: Ids
    answers: tuple[Ids, ...]
    labels: tuple[float, ...]
    where: str
    margin: float = 0.0
    reference: tuple[float, ...] = ()
    spoken: tuple[Mask, ...] = ()
    step_ends: tuple[int, ...] = ()
    step_labels: tuple[float, ...] = ()

    def __len__(self) -> int:
        """Tokens that it takes in a batch in which its prompt lies once."""
        return self.size(share=True)

    def size(self, *, share: bool) -> int:
        """Tokens that it takes in a batch of ``make_answer_batch(rows, share=share)``."""
        copies = 1 if share else len(self.answers)
        return copies * len(self.prompt) + sum(map(len, self.answers))

    @property
    def num_trained(self) -> int:
        """Number of predicted tokens."""
        return sum(int(mask.sum()) for mask in self.spoken) if self.spoken else sum(map(len, self.answers))

    @property
    def highest_id(self) -> int:
        """The largest token id."""
        return max(int(ids.max()) for ids in (self.prompt, *self.answers))

    def content(self) -> Iterator[bytes]:
        """All but reference log-probabilities, which follow from the rest and a model."""
        for ids in (self.prompt, *self.answers):
            yield len(ids).to_bytes(8, "little")
            yield np.ascontiguousarray(ids, dtype="<i4").tobytes()
        yield np.asarray([*self.labels, self.margin, *self.step_labels], dtype="<f8").tobytes()
        yield np.asarray(self.step_ends, dtype="<i4").tobytes()
        for mask in self.spoken:
            yield np.ascontiguousarray(mask, dtype=np.bool_).tobytes()


@dataclass(frozen=True, slots=True, eq=False)
class AnswerBatch(Batch):
    """Prompts with answers, one after the other; see ``Layout.branching``.

    ``bounds``, ``where``: of the prompts with all their answers. ``weights``: at each token how many answers it
    predicts a token of, ``targets``: one of these. ``num_trained``: prompts.

    Attributes:
        source_E: which token of the batch each token of the whole documents is; ``bounds_E``: their borders.
        predictors_N: the token whose state predicts; ``predicted_N``: what; ``answers_N``: of which answer.
        prompts_A: the prompt of each answer, ascending.
        labels_A, margins_A, references_A: float64, see ``Answered``; not known: nan.
        step_ends_S: the token with which each judged step ends; ``step_labels_S``: float64, how good it is.
    """

    source_E: Tensor
    bounds_E: tuple[int, ...]
    predictors_N: Tensor
    predicted_N: Tensor
    answers_N: Tensor
    prompts_A: Tensor
    labels_A: Tensor
    margins_A: Tensor
    references_A: Tensor
    step_ends_S: Tensor
    step_labels_S: Tensor

    @property
    def num_answers(self) -> int:
        return len(self.prompts_A)


@dataclass(slots=True)
class _Parts:
    """A batch in the making: ids end to end, and for each answer where they lie."""

    stream: list[Ids] = field(default_factory=list)
    source: list[npt.NDArray[np.int64]] = field(default_factory=list)
    predictors: list[npt.NDArray[np.int64]] = field(default_factory=list)
    predicted: list[Ids] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    step_ends: list[npt.NDArray[np.int64]] = field(default_factory=lambda: [np.zeros(0, np.int64)])
    bounds: list[int] = field(default_factory=lambda: [0])
    bounds_e: list[int] = field(default_factory=lambda: [0])

    def add(self, row: Answered, share: bool) -> None:
        assert len(row.prompt) > 0 and all(len(answer) > 0 for answer in row.answers), row.where
        start = at = self.bounds[-1]
        for number, answer in enumerate(row.answers):
            if number == 0 or not share:
                start = at
                self.stream.append(row.prompt)
                at += len(row.prompt)
            prompt, own = np.arange(start, start + len(row.prompt)), np.arange(at, at + len(answer))
            spoken = row.spoken[number] if row.spoken else np.ones(len(answer), np.bool_)
            self.source += [prompt, own]
            self.predictors.append(np.append(prompt[-1:], own[:-1])[spoken])
            self.predicted.append(answer[spoken])
            self.counts.append(len(self.predicted[-1]))
            self.stream.append(answer)
            if row.step_ends:
                assert len(row.answers) == 1, row.where
                self.step_ends.append(own[list(row.step_ends)])
            at += len(answer)
            self.bounds_e.append(self.bounds_e[-1] + len(prompt) + len(own))
        self.bounds.append(at)


def make_answer_batch(rows: Sequence[Answered], *, share: bool = True) -> AnswerBatch:
    """A batch of the rows in their order.

    Args:
        share: a prompt lies in it once; else every answer has a copy to itself, for models whose states follow from a
            document's whole length (``models/sharing.py``).
    """
    assert rows, "a batch needs a row"
    parts = _Parts()
    for row in rows:
        parts.add(row, share)
    at, counts = parts.bounds[-1], parts.counts
    ids, where = np.concatenate(parts.stream).astype(np.int64), tuple(row.where for row in rows)
    predictors_n = torch.from_numpy(np.concatenate(parts.predictors))
    predicted_n = torch.from_numpy(np.concatenate(parts.predicted).astype(np.int64))
    weights = torch.zeros(at).index_add_(0, predictors_n, torch.ones(len(predictors_n)))
    targets = torch.zeros(at, dtype=torch.int64).index_copy_(0, predictors_n, predicted_n)
    source_e = torch.from_numpy(np.concatenate(parts.source))
    return AnswerBatch(
        input_ids=torch.from_numpy(ids),
        positions=_positions(source_e, parts.bounds_e, at),
        bounds=tuple(parts.bounds),
        targets=targets,
        weights=weights,
        num_tokens=at,
        num_trained=float(len(rows)),
        where=where,
        source_E=source_e,
        bounds_E=tuple(parts.bounds_e),
        predictors_N=predictors_n,
        predicted_N=predicted_n,
        answers_N=torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)),
        prompts_A=torch.tensor([number for number, row in enumerate(rows) for _ in row.answers]),
        labels_A=_doubles(label for row in rows for label in row.labels),
        margins_A=_doubles(row.margin for row in rows for _ in row.answers),
        references_A=_doubles(r for row in rows for r in row.reference or (np.nan,) * len(row.answers)),
        step_ends_S=torch.from_numpy(np.concatenate(parts.step_ends)),
        step_labels_S=_doubles(label for row in rows for label in row.step_labels),
    )


def only(batch: AnswerBatch, keep_A: Tensor) -> AnswerBatch:
    """The batch with these answers (bool [A]) alone, and with the prompts that have one of them."""
    if bool(keep_A.all()):
        return batch
    sizes_A = torch.tensor(batch.bounds_E).diff()
    source_E = batch.source_E[keep_A.repeat_interleave(sizes_A)]
    used_T = torch.zeros(batch.num_tokens, dtype=torch.bool)
    used_T[source_E] = True
    new_T, new_A = used_T.cumsum(0) - 1, keep_A.cumsum(0) - 1
    keep_N = keep_A[batch.answers_N]
    predictors_N, predicted_N = new_T[batch.predictors_N[keep_N]], batch.predicted_N[keep_N]
    num_tokens = int(used_T.sum())
    kept_prompts, prompts_A = batch.prompts_A[keep_A].unique_consecutive(return_inverse=True)
    sizes = [int(used_T[batch.bounds[at] : batch.bounds[at + 1]].sum()) for at in kept_prompts.tolist()]
    keep_S = used_T[batch.step_ends_S]
    return replace(
        batch,
        input_ids=batch.input_ids[used_T],
        positions=batch.positions[used_T],
        bounds=(0, *accumulate(sizes)),
        targets=torch.zeros(num_tokens, dtype=torch.int64).index_copy_(0, predictors_N, predicted_N),
        weights=torch.zeros(num_tokens).index_add_(0, predictors_N, torch.ones(len(predictors_N))),
        num_tokens=num_tokens,
        num_trained=float(len(kept_prompts)),
        where=tuple(batch.where[at] for at in kept_prompts.tolist()),
        source_E=new_T[source_E],
        bounds_E=(0, *accumulate(sizes_A[keep_A].tolist())),
        predictors_N=predictors_N,
        predicted_N=predicted_N,
        answers_N=new_A[batch.answers_N[keep_N]],
        prompts_A=prompts_A,
        labels_A=batch.labels_A[keep_A],
        margins_A=batch.margins_A[keep_A],
        references_A=batch.references_A[keep_A],
        step_ends_S=new_T[batch.step_ends_S[keep_S]],
        step_labels_S=batch.step_labels_S[keep_S],
    )


def of_like_length(rows: Sequence[Answered], *, share: bool, capacity: int) -> Iterator[list[int]]:
    """Indices of rows by batches of about ``capacity`` tokens, rows of like length together: a batch has few of them or
    many."""
    order = sorted(range(len(rows)), key=lambda index: rows[index].size(share=share))
    chosen: list[int] = []
    size = 0
    for index in order:
        more = rows[index].size(share=share)
        if chosen and size + more > capacity:
            yield chosen
            chosen, size = [], 0
        chosen.append(index)
        size += more
    if chosen:
        yield chosen


def with_references(rows: Sequence[Answered], logprobs: npt.NDArray[np.float64]) -> tuple[Answered, ...]:
    """The rows with the log-probabilities of their answers under the reference model, float64 [rows, answers]."""
    assert len(logprobs) == len(rows) and logprobs.dtype == np.float64, (logprobs.shape, logprobs.dtype, len(rows))
    assert all(len(row.answers) == logprobs.shape[1] for row in rows), logprobs.shape
    return tuple(replace(row, reference=tuple(of)) for row, of in zip(rows, logprobs.tolist(), strict=True))


def _positions(source_E: Tensor, bounds_E: Sequence[int], num_tokens: int) -> Tensor:
    """Of each token of the batch, counted in its document."""
    starts = torch.tensor(bounds_E[:-1])
    sizes = torch.tensor(bounds_E[1:]) - starts
    index_E = torch.arange(len(source_E)) - starts.repeat_interleave(sizes)
    return torch.zeros(num_tokens, dtype=torch.int64).index_copy_(0, source_E, index_E)


def _doubles(values: object) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)  # type: ignore[call-overload]
