"""Log-probabilities of pairs of answers, and what losses make of them.

Shapes: P pairs. Everything is float64: a step has few pairs, and their log-probabilities are sums of hundreds of terms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
# Exponents end here, so that exp is finite in fp32 as well, in which gradients go on.
MAX_EXPONENT = 80.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the losses' formulas have besides log-probabilities.

    Attributes:
        beta: strength of the pull to the reference, or the factor on log-probabilities without one (ipo: tau; orpo:
            lambda, the weight of the odds ratio).
        label_smoothing: the probability that a pair is the wrong way round.
        simpo_gamma: simpo's target margin, in units of the reward beta * mean log-probability.
        dpop_lambda: weight of dpop's penalty.
        discopop_tau: temperature of discopop's mixture, below 1.
        f_divergence: what holds the policy to the reference, in losses that compare two log-ratios.
        f_alpha: TRL's f_alpha_divergence_coef.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    dpop_lambda: float = 50.0
    discopop_tau: float = 0.05
    f_divergence: Divergence = "reverse_kl"
    f_alpha: float = 0.5


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities [P] float64 of whole answers; ``sizes``: predicted tokens.

    Without a reference its log-probabilities are 0.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_reference: Tensor
    rejected_reference: Tensor
    chosen_sizes: Tensor
    rejected_sizes: Tensor

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def chosen_ratio(self) -> Tensor:
        """log pi(chosen) / reference(chosen)."""
        return self.chosen - self.chosen_reference

    @property
    def rejected_ratio(self) -> Tensor:
        return self.rejected - self.rejected_reference

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """The policy's log-probabilities per token."""
        return self.chosen / self.chosen_sizes, self.rejected / self.rejected_sizes

    def scores(self, options: Options) -> tuple[Tensor, Tensor]:
        """f'(pi / reference) of both answers: their log-ratios, unless the divergence is another."""
        return score(self.chosen_ratio, options), score(self.rejected_ratio, options)

    def margin(self, options: Options) -> Tensor:
        """How much the chosen answer scores above the rejected one."""
        chosen, rejected = self.scores(options)
        return chosen - rejected

    def mean_margin(self, options: Options) -> Tensor:
        """The margin of the scores per token."""
        chosen, rejected = self.scores(options)
        return chosen / self.chosen_sizes - rejected / self.rejected_sizes

    def detach(self) -> Pairs:
        """The same numbers without gradient."""
        return Pairs(*(values.detach() for values in self.parts()))

    def parts(self) -> tuple[Tensor, ...]:
        """The fields in order."""
        reference = self.chosen_reference, self.rejected_reference
        return self.chosen, self.rejected, *reference, self.chosen_sizes, self.rejected_sizes

    @staticmethod
    def joined(parts: Sequence[Pairs]) -> Pairs:
        """One after the other."""
        return Pairs(*(torch.cat(values) for values in zip(*(pairs.parts() for pairs in parts), strict=True)))


@dataclass(frozen=True)
class WholeStep:
    """What a pair's loss takes from elsewhere, without gradient.

    Attributes:
        pairs: those of the whole step, detached; the micro-batch's lie at ``first``.
        shift: bco_pair's delta.
    """

    pairs: Pairs
    first: int = 0
    shift: float = 0.0

    @staticmethod
    def of(pairs: Pairs, shift: float = 0.0) -> WholeStep:
        """Of pairs that are a whole step."""
        return WholeStep(pairs.detach(), shift=shift)

    def own(self, values: Tensor, count: int) -> Tensor:
        """The micro-batch's part of values of the step's pairs."""
        return values[self.first : self.first + count]


def score(ratio: Tensor, options: Options) -> Tensor:
    """f'(u) with log u = ``ratio``, up to a constant that two answers have in common (f-DPO, Wang et al. 2023).

    reverse_kl log u; forward_kl 1 - 1/u; js_divergence log 2u/(1 + u); alpha_divergence (u^(a-1) - 1)/(a - 1) with
    TRL's coefficient a, which is 1 - alpha of the paper's (1 - u^-alpha)/alpha. At a = 1 that is log u.
    """
    if options.f_divergence == "reverse_kl":
        return ratio
    if options.f_divergence == "forward_kl":
        return 1 - (-ratio).clamp(max=MAX_EXPONENT).exp()
    if options.f_divergence == "js_divergence":
        return math.log(2) + logsigmoid(ratio)
    power = options.f_alpha - 1.0
    if abs(power) < 1e-6:
        return ratio
    return (power * ratio).clamp(max=MAX_EXPONENT).expm1() / power
