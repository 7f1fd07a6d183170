"""How much better an answer, or a token of it, is than what was expected. Everything in float64.

Shapes: A answers; N tokens of all answers, end to end. A reward that is nan is none: that answer is left out of every
mean, and its advantage is 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Scale = Literal["group", "batch", "none"]

# verl's: what is added to a deviation, and to a variance.
_EPSILON, _VARIANCE_EPSILON = 1e-6, 1e-8
# Rewards that differ by less than this do not differ.
_SAME = 1e-9


@dataclass(frozen=True)
class Groups:
    """Rewards of answers, those to one prompt side by side.

    Attributes:
        rewards_A: float64; nan: none.
        sizes: answers of each prompt.
    """

    rewards_A: Doubles
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        assert sum(self.sizes) == len(self.rewards_A), (self.sizes, len(self.rewards_A))

    @property
    def parts(self) -> list[slice]:
        """Where each group lies."""
        ends = list(itertools.accumulate(self.sizes))
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    @property
    def spreads(self) -> list[float]:
        """The largest minus the smallest reward of each group: 0 where nothing can be learned from it."""
        known = [rewards[~np.isnan(rewards)] for rewards in (self.rewards_A[part] for part in self.parts)]
        return [float(np.ptp(rewards)) if len(rewards) else 0.0 for rewards in known]

    @property
    def varied(self) -> list[bool]:
        """Of each group, whether its rewards differ."""
        return [spread > _SAME for spread in self.spreads]


def group_relative(groups: Groups, *, scale: Scale = "group") -> Doubles:
    """(r - mean) / (std + 1e-6) within each group (GRPO, Shao et al. 2024, section 4.1.2), unbiased std.

    Args:
        scale: ``batch``: the deviation of all rewards in place of the group's; ``none``: not divided (Dr. GRPO).
    """
    found = np.zeros_like(groups.rewards_A)
    for part in groups.parts:
        rewards = groups.rewards_A[part]
        known = ~np.isnan(rewards)
        if known.sum() < 2:
            continue  # verl: mean 0 and deviation 1 of one answer; without a baseline there is nothing to compare with
        away = rewards - np.nanmean(rewards)
        found[part] = np.where(known, away / _divisor(groups, part, scale), 0.0)
    return found


def leave_one_out(groups: Groups) -> Doubles:
    """r minus the mean of the others of its group (RLOO, Ahmadian et al. 2024, equation 6)."""
    found = np.zeros_like(groups.rewards_A)
    for part in groups.parts:
        rewards = groups.rewards_A[part]
        known = ~np.isnan(rewards)
        count = int(known.sum())
        if count > 1:
            found[part] = np.where(known, (rewards - np.nanmean(rewards)) * count / (count - 1), 0.0)
    return found


def best_only(groups: Groups, *, scale: Scale = "group") -> Doubles:
    """Only the best answer of a group learns, by what it is better than the second (GRPO pass@k, verl)."""
    found = np.zeros_like(groups.rewards_A)
    for part in groups.parts:
        rewards = np.where(np.isnan(groups.rewards_A[part]), -np.inf, groups.rewards_A[part])
        if np.isfinite(rewards).sum() < 2:
            continue
        second, first = np.sort(rewards)[-2:]
        found[part][int(rewards.argmax())] = (first - second) / _divisor(groups, part, scale)
    return found


def length_weighted(groups: Groups, lengths: Sequence[int]) -> Doubles:
    """r minus the mean weighted by length: the baseline of least variance (OPO, Hao et al. 2025)."""
    found, lengths_A = np.zeros_like(groups.rewards_A), np.asarray(lengths, dtype=np.float64)
    for part in groups.parts:
        rewards = groups.rewards_A[part]
        known = ~np.isnan(rewards)
        if known.sum() > 1:
            weights = lengths_A[part][known]
            baseline = float((weights * rewards[known]).sum() / weights.sum())
            found[part] = np.where(known, rewards - baseline, 0.0)
    return found


def against(groups: Groups, baselines: Sequence[float] | Doubles) -> Doubles:
    """r minus a baseline for each group, such as the greedy answer's reward (ReMax, Li et al. 2023); a group whose
    baseline is nan learns nothing."""
    assert len(baselines) == len(groups.sizes), (len(baselines), len(groups.sizes))
    baselines_A = np.repeat(np.asarray(baselines, dtype=np.float64), groups.sizes)
    away = groups.rewards_A - baselines_A
    return np.where(np.isnan(away), 0.0, away)


def gpg(groups: Groups) -> Doubles:
    """alpha (r - mean), alpha: answers / answers of groups whose rewards differ (GPG, Chu et al. 2025)."""
    away = group_relative(groups, scale="none")
    moved = sum(size for size, varied in zip(groups.sizes, groups.varied, strict=True) if varied)
    return away * (len(away) / moved) if moved else away


def discounted(rewards_N: Doubles, sizes: Sequence[int], gamma: float) -> Doubles:
    """Returns of tokens: R_t = r_t + gamma R_(t+1) within each answer (REINFORCE++, Hu 2025)."""
    found, end = np.zeros_like(rewards_N), 0
    for size in sizes:
        total = 0.0
        for at in range(end + size - 1, end - 1, -1):
            total = float(rewards_N[at]) + gamma * total
            found[at] = total
        end += size
    return found


def gae(
    rewards_N: Doubles, values_N: Doubles, sizes: Sequence[int], *, gamma: float, lam: float
) -> tuple[Doubles, Doubles]:
    """Advantages A_t = delta_t + gamma lam A_(t+1), delta_t = r_t + gamma V_(t+1) - V_t, and returns A + V (Schulman et
    al. 2015, equation 16). Tokens are those that the model wrote: what an environment put between is not among them."""
    found, end = np.zeros_like(rewards_N), 0
    for size in sizes:
        after, value = 0.0, 0.0
        for at in range(end + size - 1, end - 1, -1):
            delta = float(rewards_N[at]) + gamma * value - float(values_N[at])
            after = delta + gamma * lam * after
            found[at], value = after, float(values_N[at])
        end += size
    return found, found + values_N


def whitened(values: Doubles, used: Mask | None = None, *, shift: bool = True) -> Doubles:
    """(x - mean) / sqrt(var + 1e-8) over the ``used`` ones, unbiased variance; ``shift`` false: the mean stays."""
    among = values if used is None else values[used]
    if len(among) < 2:
        return values.copy()
    mean = float(among.mean())
    scaled: Doubles = (values - mean) / np.sqrt(float(among.var(ddof=1)) + _VARIANCE_EPSILON)
    return scaled if shift else scaled + mean


def _divisor(groups: Groups, part: slice, scale: Scale) -> float:
    """What a group's centred rewards are divided by."""
    if scale == "none":
        return 1.0
    return _deviation(groups.rewards_A if scale == "batch" else groups.rewards_A[part]) + _EPSILON


def _deviation(rewards: Doubles) -> float:
    known = rewards[~np.isnan(rewards)]
    return float(known.std(ddof=1)) if len(known) > 1 else 0.0
