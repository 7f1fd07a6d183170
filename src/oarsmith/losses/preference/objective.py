"""The objective of ``oarsmith dpo``: a weighted sum of losses of pairs, and the NLL of the chosen answers.

Shapes: N predicted tokens, A answers (chosen and rejected in turn), P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from oarsmith.data.answers import AnswerBatch
from oarsmith.data.batch import Batch
from oarsmith.errors import ConfigError
from oarsmith.losses.answers import AnswerScores, score_answers
from oarsmith.losses.preference.pairs import Options, Pairs, WholeStep
from oarsmith.losses.preference.table import ALIASES, LOSS_TYPES, LossType
from oarsmith.models.decoder import Decoder
from oarsmith.training.objective import Objective, Outcome, StepObjective


@dataclass
class _Shift:
    """bco_pair's border between good and bad: the mean reward of all answers of the steps before, 0 at the start, when
    the policy is its reference. So a step's loss does not depend on how it is split."""

    total: float = 0.0
    count: float = 0.0

    @property
    def value(self) -> float:
        return self.total / self.count if self.count > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss(StepObjective):
    """pref_loss_ratio * mean over pairs of sum_i weight_i * loss_i + sft_loss_ratio * NLL per token of chosen answers.

    Both means are over the whole step. Batches are ``AnswerBatch`` with two answers a prompt, the chosen one first, and
    ``references_A`` where :attr:`needs_reference`.

    Args:
        terms: names of ``LOSS_TYPES`` with weights (MPO, Wang et al. 2024: several).
        sft_loss_ratio: RPO's alpha (Pang et al. 2024), CPO's alpha. None: what the losses have in their papers, 1 for
            orpo and cpo, else 0. The term sft comes on top.
        reference_free: the reference's log-probabilities count as 0 (a uniform one).
        weighted: WPO (Zhou et al. 2024): a pair counts by how likely both answers are under the policy.

    Raises:
        ConfigError: an unknown name, or what does not go together.
    """

    terms: tuple[tuple[str, float], ...] = (("sigmoid", 1.0),)
    options: Options = field(default_factory=Options)
    pref_loss_ratio: float = 1.0
    sft_loss_ratio: float | None = None
    reference_free: bool = False
    weighted: bool = False
    _shift: _Shift = field(default_factory=_Shift, init=False)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def types(self) -> tuple[tuple[LossType, float], ...]:
        """The losses with their weights."""
        return tuple((LOSS_TYPES[ALIASES.get(name, name)], weight) for name, weight in self.terms)

    @property
    def needs_reference(self) -> bool:
        """Whether batches must have the reference's log-probabilities."""
        return not self.reference_free and any(kind.reference for kind, _ in self.types)

    @property
    def nll_weight(self) -> float:
        """The weight of the NLL."""
        asked = sum(kind.nll * weight for kind, weight in self.types if kind.function is None)
        if self.sft_loss_ratio is not None:
            return asked + self.sft_loss_ratio
        return asked + sum(kind.nll * weight for kind, weight in self.types if kind.function is not None)

    def of_step(self, model: Decoder, batches: Sequence[Batch]) -> Objective:
        """Orders and means over the step take a pass without gradient, if the step has several batches."""
        found = [_checked(batch) for batch in batches]
        counts = [float((batch.answers_N % 2 == 0).sum()) for batch in found]
        share = sum(batch.num_trained for batch in found) / max(sum(counts), 1.0)
        wholes: dict[Batch, WholeStep] = {}
        if len(found) > 1 and any(kind.of_step for kind, _ in self.types):
            with torch.no_grad():
                parts = [self.pairs(batch, score_answers(model, batch)) for batch in found]
            joined, first = Pairs.joined(parts), 0
            for batch, part in zip(found, parts, strict=True):
                wholes[batch] = WholeStep(joined, first, self._shift.value)
                first += len(part)
        return _OfStep(self, share, wholes)

    def note(self, sums: Mapping[str, float], count: float) -> None:
        """The rewards of a step move the border."""
        if "border" in sums:
            self._shift.total += sums["border"]
            self._shift.count += count

    def state(self) -> dict[str, float]:
        """The mean reward."""
        return {"reward_total": self._shift.total, "reward_count": self._shift.count}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Go on from it; nothing saved: from the start."""
        self._shift.total, self._shift.count = state.get("reward_total", 0.0), state.get("reward_count", 0.0)

    def step_alone(self, pairs: Pairs) -> WholeStep:
        """Of pairs that are a step."""
        return WholeStep.of(pairs, self._shift.value)

    def pairs(self, batch: AnswerBatch, scores: AnswerScores) -> Pairs:
        """Log-probabilities of the batch's pairs."""
        sums_A, sizes_A = scores.sums_A, scores.sizes_A
        references_A = torch.zeros_like(sums_A)
        if self.needs_reference:
            assert not bool(batch.references_A.isnan().any()), batch.where
            references_A = batch.references_A.to(sums_A.device)
        return Pairs(*(part for values in (sums_A, references_A, sizes_A) for part in (values[0::2], values[1::2])))

    def loss(self, pairs: Pairs, step: WholeStep, weights: Tensor | None = None) -> Tensor:
        """[P], without the NLL."""
        total = torch.zeros_like(pairs.chosen)
        for kind, weight in self.types:
            if kind.function is not None:
                total = total + weight * kind.function(pairs, self.options, step)
        return self.pref_loss_ratio * (total if weights is None else total * weights)

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """What the first loss compares, times beta: log-ratios or log-probabilities, of answers or per token."""
        kind, beta = self.types[0][0], self.options.beta
        if not kind.reference:
            chosen, rejected = pairs.means if kind.averaged else (pairs.chosen, pairs.rejected)
        elif kind.averaged:
            chosen, rejected = pairs.chosen_ratio / pairs.chosen_sizes, pairs.rejected_ratio / pairs.rejected_sizes
        else:
            chosen, rejected = pairs.chosen_ratio, pairs.rejected_ratio
        return beta * chosen.detach(), beta * rejected.detach()


@dataclass(frozen=True)
class _OfStep:
    """The objective for one step. ``share``: pairs of the step / tokens of its chosen answers."""

    own: PreferenceLoss
    share: float
    wholes: Mapping[Batch, WholeStep]

    def __call__(self, model: Decoder, batch: Batch, scale: float) -> Outcome:
        own, found = self.own, _checked(batch)
        scores = score_answers(model, found, squares=own.weighted)
        pairs = own.pairs(found, scores)
        whole = self.wholes.get(batch) or own.step_alone(pairs)
        total = own.loss(pairs, whole, _policy_weights(scores) if own.weighted else None).sum()
        nll = -self.share * pairs.chosen.sum()
        if own.nll_weight != 0:
            total = total + own.nll_weight * nll
        sums = _metrics(pairs, *own.rewards(pairs), reference=own.needs_reference) | {"nll": float(nll.detach())}
        if "bco_pair" in dict(own.terms):
            sums["border"] = 0.5 * own.options.beta * float((pairs.chosen_ratio + pairs.rejected_ratio).sum())
        return Outcome(loss=total * scale, total=float(total.detach()), count=found.num_trained, sums=sums)


def _metrics(pairs: Pairs, chosen: Tensor, rejected: Tensor, *, reference: bool) -> dict[str, float]:
    """Sums over pairs. ``kl``: the log-ratio, mean of both answers, which estimates the KL divergence as far as the
    policy would give them; it may be negative."""
    found = {
        "rewards_chosen": chosen,
        "rewards_rejected": rejected,
        "accuracy": (chosen > rejected).double(),
        "margin": chosen - rejected,
        "logps_chosen": pairs.chosen.detach(),
        "logps_rejected": pairs.rejected.detach(),
    }
    if reference:
        found["kl"] = 0.5 * (pairs.chosen_ratio + pairs.rejected_ratio).detach()
    totals = torch.stack([values.sum() for values in found.values()]).tolist()  # one transfer from a GPU
    return dict(zip(found, totals, strict=True))


def _policy_weights(scores: AnswerScores) -> Tensor:
    """WPO's weight of each pair, equation 2: exp of the mean of log p - log sum p^2, of one answer times the other."""
    assert scores.squares_N is not None
    aligned_N = scores.logprobs_N.detach().double() - scores.squares_N.double()
    weights_A = (scores.sum_A(aligned_N) / scores.sizes_A).exp()
    return weights_A[0::2] * weights_A[1::2]


def _checked(batch: Batch) -> AnswerBatch:
    assert isinstance(batch, AnswerBatch), type(batch)
    in_pairs = torch.arange(len(batch.where)).repeat_interleave(2)
    assert torch.equal(batch.prompts_A, in_pairs), f"two answers a prompt: {batch.where}"
    return batch


def _check(loss: PreferenceLoss) -> None:
    """Refuse what has no meaning."""
    names = [name for name, _ in loss.terms]
    for name in names:
        if ALIASES.get(name, name) not in LOSS_TYPES:
            known = ", ".join(sorted({*LOSS_TYPES, *ALIASES}))
            raise ConfigError(f"there is no loss {name!r}", where="loss_type", fix=f"choose from {known}")
    options, kinds = loss.options, dict(zip(names, (kind for kind, _ in loss.types), strict=True))
    if options.beta <= 0:
        raise ConfigError(f"beta is {options.beta}", where="beta", fix="choose a number above 0")
    smoothing = options.label_smoothing
    if "exo_pair" in names and not 0 < smoothing < 1:
        raise ConfigError(
            f"exo_pair takes the logarithm of {smoothing}", where="label_smoothing", fix="its paper recommends 0.001"
        )
    if not 0 <= smoothing < 0.5 and names != ["exo_pair"]:
        raise ConfigError(f"{smoothing} of all pairs", where="label_smoothing", fix="choose from 0 to below 0.5")
    if "discopop" in names and not 0 < options.discopop_tau < 1:
        raise ConfigError(
            f"discopop_tau is {options.discopop_tau}", where="discopop_tau", fix="choose between 0 and 1, as 0.05"
        )
    cannot = [name for name, kind in kinds.items() if kind.function is not None and not kind.divergences]
    if options.f_divergence != "reverse_kl" and cannot:
        raise ConfigError(
            f"{options.f_divergence} has no meaning in {', '.join(cannot)}, which do not compare two log-ratios",
            where="f_divergence_type",
            fix="leave it at reverse_kl",
        )
    sorting = [name for name in names if ALIASES.get(name, name).startswith("aot")]
    if loss.weighted and sorting:
        raise ConfigError(f"{', '.join(sorting)} sorts pairs apart", where="use_weighting", fix="set it to false")
