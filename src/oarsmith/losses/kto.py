"""KTO: single answers that are good or bad, and a KL term from answers that belong to other prompts.

Shapes: A answers, own ones and mismatched ones; O own ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from oarsmith.data.answers import AnswerBatch, only
from oarsmith.data.batch import Batch
from oarsmith.losses.answers import score_answers
from oarsmith.models.decoder import Decoder
from oarsmith.training.objective import Objective, Outcome, StepObjective

KtoType = Literal["kto", "apo_zero_unpaired"]


@dataclass(frozen=True, kw_only=True)
class KtoLoss(StepObjective):
    """Mean over the step's own answers of weight * (1 - s(beta * (r - KL))), or s(KL - r) for bad ones.

    r: log-ratio to the reference. KL: mean log-ratio of the step's mismatched answers, not below 0, without gradient
    (Ethayarajh et al. 2024, equation 7). Batches are ``AnswerBatch`` with ``references_A``: of each prompt one answer
    with a label of 1 or 0 and, for the KL, one with label nan, which takes no part in the gradient's passes.

    Args:
        loss_type: apo_zero_unpaired (D'Oosterlinck et al. 2024, equation 7 without pairs): the same with a KL of 0.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    loss_type: KtoType = "kto"

    @property
    def needs_mismatched(self) -> bool:
        """Whether rows must carry a second answer."""
        return self.loss_type == "kto"

    def of_step(self, model: Decoder, batches: Sequence[Batch]) -> Objective:
        """A pass without gradient over the mismatched answers, which are not in the one with it."""
        found = [_checked(batch) for batch in batches]
        labels = torch.cat([batch.labels_A for batch in found])
        good, bad = float((labels == 1).sum()), float((labels == 0).sum())
        assert good + bad == sum(batch.num_trained for batch in found), "each prompt has one answer with a label"
        kl = self._kl(model, found) if self.needs_mismatched else 0.0
        return _OfStep(self, kl, (good + bad) / max(good, 1), (good + bad) / max(bad, 1))

    @torch.no_grad()
    def _kl(self, model: Decoder, batches: Sequence[AnswerBatch]) -> float:
        total, count = 0.0, 0
        for batch in batches:
            mismatched_A = batch.labels_A.isnan()
            if not bool(mismatched_A.any()):
                continue
            part = only(batch, mismatched_A)
            ratios_A = score_answers(model, part).sums_A - part.references_A.to(model.device)
            total, count = total + float(ratios_A.sum()), count + part.num_answers
        assert count > 0, "kto needs mismatched answers"
        return max(total / count, 0.0)

    def losses(self, ratios_O: Tensor, labels_O: Tensor, kl: float) -> Tensor:
        """[O], float64."""
        good = self.desirable_weight * torch.sigmoid(-self.beta * (ratios_O - kl))
        return torch.where(labels_O == 1, good, self.undesirable_weight * torch.sigmoid(self.beta * (ratios_O - kl)))


@dataclass(frozen=True)
class _OfStep:
    """The objective for one step. ``good_share``, ``bad_share``: own answers of the step for each good or bad one."""

    own: KtoLoss
    kl: float
    good_share: float
    bad_share: float

    def __call__(self, model: Decoder, batch: Batch, scale: float) -> Outcome:
        found = _checked(batch)
        found = only(found, ~found.labels_A.isnan())
        sums_O = score_answers(model, found).sums_A
        labels_O = found.labels_A.to(sums_O.device)
        ratios_O = sums_O - found.references_A.to(sums_O.device)
        total = self.own.losses(ratios_O, labels_O, self.kl).sum()
        sums = self._metrics(sums_O.detach(), ratios_O.detach(), labels_O)
        return Outcome(loss=total * scale, total=float(total.detach()), count=found.num_trained, sums=sums)

    def _metrics(self, sums_O: Tensor, ratios_O: Tensor, labels_O: Tensor) -> dict[str, float]:
        """Of good and bad answers means over their kind; ``accuracy``: on which side of the KL an answer lies."""
        good, rewards_O = labels_O == 1, self.own.beta * ratios_O
        totals = torch.stack(
            [
                self.good_share * rewards_O[good].sum(),
                self.bad_share * rewards_O[~good].sum(),
                self.good_share * sums_O[good].sum(),
                self.bad_share * sums_O[~good].sum(),
                ((ratios_O > self.kl) == good).sum().double(),
            ]
        ).tolist()
        names = "rewards_chosen", "rewards_rejected", "logps_chosen", "logps_rejected", "accuracy"
        sums = dict(zip(names, totals, strict=True))
        return sums | {"margin": totals[0] - totals[1], "kl": self.kl * len(labels_O)}


def _checked(batch: Batch) -> AnswerBatch:
    assert isinstance(batch, AnswerBatch), type(batch)
    return batch
