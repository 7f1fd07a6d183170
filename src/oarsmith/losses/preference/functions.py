"""Every loss of a pair, as a pure function.

Each takes log-probabilities (``Pairs``), ``Options`` and what it needs of the ``WholeStep``, and gives [P] float64, of
which the step's loss is the mean. z: margin of log-ratios; r_c, r_r: log-ratios of the chosen and the rejected answer;
s: logistic function. ``table.py`` has the formulas, ``docs/alignment.md`` what other programs do differently.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from oarsmith.losses.preference.pairs import MAX_EXPONENT, Options, Pairs, WholeStep

# Mean log-probabilities nearer to 0 than this count as this, or log(1 - p) would be infinite.
NEAREST = -1e-7


def sigmoid(pairs: Pairs, options: Options, step: WholeStep) -> Tensor:
    """DPO (Rafailov et al. 2023), with label smoothing conservative DPO (Mitchell 2023)."""
    return _smoothed(options.beta * pairs.margin(options), options)


def sigmoid_norm(pairs: Pairs, options: Options, step: WholeStep) -> Tensor:
    """Length-normalised DPO (Tulu 3, Lambert et al. 2024): log-ratios per token."""
    return _smoothed(options.beta * pairs.mean_margin(options), options)


def robust(pairs: Pairs, options: Options, step: WholeStep) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024): over flipped labels its mean is DPO's over true ones; may be negative."""
    z, flipped = options.beta * pairs.margin(options), options.label_smoothing
    return (flipped * logsigmoid(-z) - (1 - flipped) * logsigmoid(z)) / (1 - 2 * flipped)


def hinge(pairs: Pairs, options: Options, step: WholeStep) -> Tensor:
    """SLiC (Zhao et al. 2023) on the margin, as normalised in RSO (Liu et al. 2023)."""
    return torch.relu(1 - options.beta * pairs.margin(options))


def ipo(pairs: Pairs, options: Options, step: WholeStep) -> Tensor:
    """IPO (Azar et al. 2023, equation 17), on log-ratios per token as its authors confirmed to TRL's."""
    return (pairs.mean_margin(options) - 1 / (2 * options.beta)).square()


def exo_pair(pairs: Pairs, options: Options, step: WholeStep) -> Tensor:
    """EXO (Ji et al. 2024, equation 16): KL of the policy's choice from the smoothed labels."""
    z, epsilon = options.beta * pairs.margin(options), options.label_smoothing
    log_w, log_l = logsigmoid(z), logsigmoid(-z)
    return log_w.exp() * (log_w - math.log1p(-epsilon)) + log_l.exp() * (log_l - math.log(epsilon))


def discopop(pairs: Pairs, options: Options, step: WholeStep) -> Tensor:
    """DiscoPOP (Lu et al. 2024, equation 5): logistic and exponential loss, mixed by the margin."""
    z = options.beta * pairs.margin(options)
    # s(z / tau) exp(-z) in one exponent: each by itself overflows far to the left, together they vanish there.
    mixed = logsigmoid(z / options.discopop_tau)
    exponential = (mixed - z).clamp(max=MAX_EXPONENT).exp()
    return -logsigmoid(z) * torch.sigmoid(-z / options.discopop_tau) + exponential


def dpop_added(pairs: Pairs, options: Options, step: WholeStep) -> Tensor:
    """DPO-Positive as earlier PaddleNLP has it, with the penalty beside the log-sigmoid."""
    return -logsigmoid(options.beta * pairs.margin(options)) + options.dpop_lambda * torch.relu(-pairs.chosen_ratio)


def dpop(pairs: Pairs, options: Options, step: WholeStep) -> Tensor:
    """DPO-Positive (Smaug, Pal et al. 2024, equation 3): a penalty for a chosen answer below its reference."""
    penalty = options.dpop_lambda * torch.relu(-pairs.chosen_ratio)
    return -logsigmoid(options.beta * (pairs.margin(options) - penalty))


def kto_pair(pairs: Pairs, options: Options, step: WholeStep) -> Tensor:
    """KTO on pairs: each side's KL is the mean log-ratio of the step's other side, not below 0, without gradient.

    PaddleNLP takes the mean over the answers, twice as many as pairs; so half of the sum here.
    """
    chosen_kl, rejected_kl = (r.mean().clamp(min=0) for r in (step.pairs.chosen_ratio, step.pairs.rejected_ratio))
    chosen = torch.sigmoid(-options.beta * (pairs.chosen_ratio - rejected_kl))
    return 0.5 * (chosen + torch.sigmoid(-options.beta * (chosen_kl - pairs.rejected_ratio)))


def bco_pair(pairs: Pairs, options: Options, step: WholeStep) -> Tensor:
    """BCO (Jung et al. 2024): a classifier of both answers, its border the mean reward of earlier steps."""
    chosen, rejected = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return -logsigmoid(chosen - step.shift) - logsigmoid(step.shift - rejected)


def nca_pair(pairs: Pairs, options: Options, step: WholeStep) -> Tensor:
    """NCA (Chen et al. 2024) for two answers."""
    chosen, rejected = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def sppo_hard(pairs: Pairs, options: Options, step: WholeStep) -> Tensor:
    """SPPO (Wu et al. 2024, equation 4.7) with a winning probability of 1."""
    half = 0.5 / options.beta
    return (pairs.chosen_ratio - half).square() + (pairs.rejected_ratio + half).square()


def apo_zero(pairs: Pairs, options: Options, step: WholeStep) -> Tensor:
    """APO (D'Oosterlinck et al. 2024, equation 7): chosen answers are better than the model's."""
    return torch.sigmoid(-options.beta * pairs.chosen_ratio) + torch.sigmoid(options.beta * pairs.rejected_ratio)


def apo_down(pairs: Pairs, options: Options, step: WholeStep) -> Tensor:
    """APO (equation 8): chosen answers are worse than the model's."""
    lower = torch.sigmoid(options.beta * pairs.chosen_ratio)
    return lower + torch.sigmoid(-options.beta * (pairs.chosen_ratio - pairs.rejected_ratio))


def aot(pairs: Pairs, options: Options, step: WholeStep) -> Tensor:
    """AOT (Melnyk et al. 2024), paired: the step's margins under the policy, sorted, against those of the reference."""
    whole = step.pairs
    partners = _partners(whole.chosen - whole.rejected, whole.chosen_reference - whole.rejected_reference)
    margin = pairs.chosen - pairs.rejected - step.own(partners, len(pairs))
    return _smoothed(options.beta * margin, options)


def aot_unpaired(pairs: Pairs, options: Options, step: WholeStep) -> Tensor:
    """AOT, unpaired: the step's log-ratios of chosen answers, sorted, against those of rejected ones.

    A chosen answer's partner and a rejected one's may lie in other micro-batches: each side gets its gradient from the
    term in which the other is a constant, and each has half of the value.
    """
    chosen, rejected = step.pairs.chosen_ratio, step.pairs.rejected_ratio
    below, above = _partners(chosen, rejected), _partners(rejected, chosen)
    left = _smoothed(options.beta * (pairs.chosen_ratio - step.own(below, len(pairs))), options)
    right = _smoothed(options.beta * (step.own(above, len(pairs)) - pairs.rejected_ratio), options)
    return left + right - 0.5 * (left + right).detach()


def simpo(pairs: Pairs, options: Options, step: WholeStep) -> Tensor:
    """SimPO (Meng et al. 2024): mean log-probabilities, no reference, a target margin."""
    chosen, rejected = pairs.means
    return _smoothed(options.beta * (chosen - rejected) - options.simpo_gamma, options)


def cpo(pairs: Pairs, options: Options, step: WholeStep) -> Tensor:
    """CPO (Xu et al. 2024, equation 3): DPO with a uniform reference; its NLL is the loss's SFT term."""
    return _smoothed(options.beta * (pairs.chosen - pairs.rejected), options)


def odds_ratio(pairs: Pairs, options: Options, step: WholeStep) -> Tensor:
    """ORPO's odds ratio (Hong et al. 2024, equation 7) of mean probabilities, by itself: PaddleNLP's ``or``."""
    chosen, rejected = (mean.clamp(max=NEAREST) for mean in pairs.means)
    return -logsigmoid((chosen - rejected) - (_log_complement(chosen) - _log_complement(rejected)))


def orpo(pairs: Pairs, options: Options, step: WholeStep) -> Tensor:
    """ORPO (equation 6): lambda, here beta, times the odds ratio; its NLL is the loss's SFT term."""
    return options.beta * odds_ratio(pairs, options, step)


def _smoothed(z: Tensor, options: Options) -> Tensor:
    """-(1 - e) log s(z) - e log s(-z)."""
    loss = -logsigmoid(z)
    # log s(-z) = log s(z) - z
    return loss + options.label_smoothing * z if options.label_smoothing > 0 else loss


def _partners(values: Tensor, others: Tensor) -> Tensor:
    """To each value the one of ``others`` that has its place when both are sorted."""
    places = values.argsort(stable=True)
    return torch.empty_like(others).index_copy_(0, places, others.sort().values)


def _log_complement(log_p: Tensor) -> Tensor:
    """log(1 - p), exact on both ends (Maechler 2012)."""
    near = (-log_p.clamp(min=-math.log(2)).expm1()).log()
    return torch.where(log_p > -math.log(2), near, (-log_p.clamp(max=-math.log(2)).exp()).log1p())
