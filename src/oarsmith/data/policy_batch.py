"""Batches of sampled answers with what a policy learns from them.

Shapes: N tokens that the model wrote, A answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from oarsmith.data.answers import AnswerBatch, Answered, make_answer_batch, only
from oarsmith.data.batch import Batch

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """One answer and what is known of its own tokens, each an array over these.

    Attributes:
        prompt, ids: int32; ``own``: which of the ids the model wrote.
        sampled: their log-probabilities by the sampler; ``old``: by the trainer under the same weights (nan: those that
            it has when it learns); ``reference``: under the reference (nan: there is none).
        advantages, weights: see ``losses/policy``.
        values, returns: a critic's, when the answer was sampled; empty without one.
    """

    prompt: npt.NDArray[np.int32]
    ids: npt.NDArray[np.int32]
    own: npt.NDArray[np.bool_]
    sampled: Floats
    old: Floats
    reference: Floats
    advantages: Floats
    weights: Floats
    where: str
    values: Floats = field(default_factory=lambda: np.zeros(0, np.float32))
    returns: Floats = field(default_factory=lambda: np.zeros(0, np.float32))

    @property
    def answered(self) -> Answered:
        """As a row of an answer batch."""
        return Answered(self.prompt, (self.ids,), (float("nan"),), self.where, spoken=(self.own,))


@dataclass(frozen=True, slots=True, eq=False)
class PolicyBatch(AnswerBatch):
    """Answers of a rollout. ``num_trained``: what their weighted losses are divided by.

    Attributes:
        sampled_N, old_N, reference_N, advantages_N, token_weights_N, values_N, returns_N: float32, see ``Learned``.
        sizes: tokens of each answer that the model wrote.
        facts: means over the whole rollout, such as its reward, which the log of its steps repeats.
        companion: texts that are learned as they are beside the answers (PTX).
    """

    sampled_N: Tensor
    old_N: Tensor
    reference_N: Tensor
    advantages_N: Tensor
    token_weights_N: Tensor
    values_N: Tensor
    returns_N: Tensor
    sizes: tuple[int, ...]
    facts: Mapping[str, float]
    companion: Batch | None = None


def make_policy_batch(
    answers: Sequence[Learned],
    *,
    count: float,
    facts: Mapping[str, float],
    share: bool = True,
    companion: Batch | None = None,
) -> PolicyBatch:
    """A batch of answers; those to one prompt that lie side by side share it.

    Args:
        count: the batch's part of what the step's loss is divided by.
        share: whether the model can read a prompt once for its answers.
    """
    batch = make_answer_batch(_rows(answers), share=share)
    parts = {part.name: getattr(batch, part.name) for part in fields(AnswerBatch)}

    def joined(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(answer, name) for answer in answers]))

    return PolicyBatch(
        **{**parts, "num_trained": count},
        sampled_N=joined("sampled"),
        old_N=joined("old"),
        reference_N=joined("reference"),
        advantages_N=joined("advantages"),
        token_weights_N=joined("weights"),
        values_N=joined("values"),
        returns_N=joined("returns"),
        sizes=tuple(int(answer.own.sum()) for answer in answers),
        facts=facts,
        companion=companion,
    )


def only_answers(batch: PolicyBatch, keep_A: Tensor) -> PolicyBatch:
    """The batch with these answers (bool [A]) alone; what its loss is divided by stays."""
    keep_N = keep_A[batch.answers_N]
    kept = only(batch, keep_A)
    assert isinstance(kept, PolicyBatch), type(kept)
    # Without a critic there are no values.
    values_N, returns_N = (x[keep_N] if len(x) else x for x in (batch.values_N, batch.returns_N))
    return replace(
        kept,
        num_trained=batch.num_trained,
        sampled_N=batch.sampled_N[keep_N],
        old_N=batch.old_N[keep_N],
        reference_N=batch.reference_N[keep_N],
        advantages_N=batch.advantages_N[keep_N],
        token_weights_N=batch.token_weights_N[keep_N],
        values_N=values_N,
        returns_N=returns_N,
        sizes=tuple(size for size, keep in zip(batch.sizes, keep_A.tolist(), strict=True) if keep),
    )


def _rows(answers: Sequence[Learned]) -> list[Answered]:
    """Answers to the same prompt, one after the other, are one row."""
    rows: list[Answered] = []
    last: npt.NDArray[np.int32] | None = None
    for answer in answers:
        if last is not None and answer.prompt is last:
            before = rows[-1]
            rows[-1] = Answered(
                before.prompt,
                (*before.answers, answer.ids),
                (*before.labels, float("nan")),
                before.where,
                spoken=(*before.spoken, answer.own),
            )
        else:
            rows.append(answer.answered)
        last = answer.prompt
    return rows
