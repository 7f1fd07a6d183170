"""Prompts with answers that are judged: pairs of a preference, single answers, and batches of them.

A prompt lies in a batch once, its answers behind it; each answer continues the prompt as if the others were not there.
Shapes: T tokens of the batch, E tokens of the whole documents (prompt and answer), N predicted tokens, A answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from oarsmith.data.batch import Batch

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """A prompt and its answers, the better one first where they are a pair.

    Attributes:
        prompt: int32 ids, at least one.
        answers: int32 ids of each, at least one; every token of them is predicted.
        labels: of each answer, what the data says of it: 1 good, 0 bad.
        margin: how much better the first one is, where the data says so.
        reference: of each answer, its log-probability under the reference model; () until it is known.
        where: file:line of the row.
    """

    prompt: Ids
    answers: tuple[Ids, ...]
    labels: tuple[float, ...]
    where: str
    margin: float = 0.0
    reference: tuple[float, ...] = ()

    def __len__(self) -> int:
        """Tokens that it takes in a batch."""
        return len(self.prompt) + sum(map(len, self.answers))


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

    @property
    def num_answers(self) -> int:
        return len(self.prompts_A)


def make_answer_batch(rows: Sequence[Answered], *, share: bool = True) -> AnswerBatch:
    """A batch of the rows in their order.

    Args:
        share: a prompt lies in it once; else every answer has a copy to itself, for models whose states follow from a
            document's whole length (``models/sharing.py``).
    """
    assert rows, "a batch needs a row"
    stream: list[Ids] = []
    source: list[npt.NDArray[np.int64]] = []
    predictors: list[npt.NDArray[np.int64]] = []
    at, bounds, bounds_e, counts = 0, [0], [0], list[int]()
    for row in rows:
        assert len(row.prompt) > 0 and all(len(answer) > 0 for answer in row.answers), row.where
        start = at
        for number, answer in enumerate(row.answers):
            if number == 0 or not share:
                start = at
                stream.append(row.prompt)
                at += len(row.prompt)
            own = np.arange(at, at + len(answer))
            prompt = np.arange(start, start + len(row.prompt))
            source += [prompt, own]
            predictors += [prompt[-1:], own[:-1]]
            counts.append(len(answer))
            stream.append(answer)
            at += len(answer)
            bounds_e.append(bounds_e[-1] + len(prompt) + len(own))
        bounds.append(at)
    ids, where = np.concatenate(stream).astype(np.int64), tuple(row.where for row in rows)
    predictors_n = torch.from_numpy(np.concatenate(predictors))
    predicted_n = torch.from_numpy(np.concatenate([a for row in rows for a in row.answers]).astype(np.int64))
    weights = torch.zeros(at).index_add_(0, predictors_n, torch.ones(len(predictors_n)))
    targets = torch.zeros(at, dtype=torch.int64).index_copy_(0, predictors_n, predicted_n)
    source_e = torch.from_numpy(np.concatenate(source))
    return AnswerBatch(
        input_ids=torch.from_numpy(ids),
        positions=_positions(source_e, bounds_e, at),
        bounds=tuple(bounds),
        targets=targets,
        weights=weights,
        num_tokens=at,
        num_trained=float(len(rows)),
        where=where,
        source_E=source_e,
        bounds_E=tuple(bounds_e),
        predictors_N=predictors_n,
        predicted_N=predicted_n,
        answers_N=torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)),
        prompts_A=torch.tensor([number for number, row in enumerate(rows) for _ in row.answers]),
        labels_A=_doubles(label for row in rows for label in row.labels),
        margins_A=_doubles(row.margin for row in rows for _ in row.answers),
        references_A=_doubles(r for row in rows for r in row.reference or (np.nan,) * len(row.answers)),
    )


def _positions(source_E: Tensor, bounds_E: Sequence[int], num_tokens: int) -> Tensor:
    """Of each token of the batch, counted in its document."""
    starts = torch.tensor(bounds_E[:-1])
    sizes = torch.tensor(bounds_E[1:]) - starts
    index_E = torch.arange(len(source_E)) - starts.repeat_interleave(sizes)
    return torch.zeros(num_tokens, dtype=torch.int64).index_copy_(0, source_E, index_E)


def _doubles(values: object) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)  # type: ignore[call-overload]
