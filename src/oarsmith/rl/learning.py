"""From rewards to what each token of an answer learns by: one rule an algorithm.

Shapes: A answers, those to one prompt side by side; N tokens that the model wrote, end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from oarsmith.rl import advantages
from oarsmith.rl.advantages import Doubles, Groups, Scale

Estimator = Literal["group", "rloo", "reinforce++", "reinforce++_baseline", "remax", "opo", "gpg", "grpo_passk"]


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """What is known of a rollout's answers.

    Attributes:
        groups: their rewards.
        sizes: tokens of each that the model wrote.
        baselines: remax: the greedy answer's reward, by prompt; nan: none.
        penalties_N: of each token what is taken from its reward: kl_coeff (log p - log p_reference); empty: nothing.
    """

    groups: Groups
    sizes: tuple[int, ...]
    baselines: tuple[float, ...] = ()
    penalties_N: Doubles


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Turns outcomes into advantages.

    Args:
        scale: ``group``, ``batch`` or ``none``, for estimators that divide by a deviation.
        gamma: of reinforce++'s discounted returns.
        clip: rewards are held within plus and minus this; None: they are not.
        normalize: divide rewards by the deviation of all of the rollout's and centre them, before anything else.
        whiten: advantages of all tokens get mean 0 and deviation 1, in the end.
    """

    estimator: Estimator = "group"
    scale: Scale = "group"
    gamma: float = 1.0
    clip: float | None = None
    normalize: bool = False
    whiten: bool = False

    @property
    def needs_greedy(self) -> bool:
        """Whether every prompt needs a greedy answer beside the drawn ones."""
        return self.estimator == "remax"

    def advantages(self, outcomes: Outcomes) -> Doubles:
        """Of each token [N]."""
        sizes, penalties_N = outcomes.sizes, outcomes.penalties_N
        rewards_A, baselines = self._settled(outcomes.groups.rewards_A, outcomes.baselines)
        groups = Groups(rewards_A, outcomes.groups.sizes)
        by_token = self.estimator == "reinforce++"
        if len(penalties_N) and not by_token:
            starts = np.cumsum([0, *sizes[:-1]])
            groups = Groups(groups.rewards_A - np.add.reduceat(penalties_N, starts), groups.sizes)
        if by_token:
            found_N = self._returns(groups, sizes, penalties_N)
        else:
            found_N = np.repeat(self._of_answers(groups, baselines, sizes), sizes)
        known_N = np.repeat(~np.isnan(groups.rewards_A), sizes)
        if by_token or self.whiten or self.estimator == "reinforce++_baseline":
            found_N = advantages.whitened(found_N, known_N)
        return np.where(known_N, found_N, 0.0)

    def _settled(self, rewards_A: Doubles, baselines: Sequence[float]) -> tuple[Doubles, Doubles]:
        """Rewards and baselines, clipped and normalised alike: the numbers that they follow from are the rewards'."""
        both = np.concatenate([rewards_A, np.asarray(baselines, dtype=np.float64)])
        if self.clip is not None:
            both = both.clip(-self.clip, self.clip)
        if self.normalize:
            counted = ~np.isnan(both)
            counted[len(rewards_A) :] = False
            both = advantages.whitened(both, counted)
        return both[: len(rewards_A)], both[len(rewards_A) :]

    def _returns(self, groups: Groups, sizes: Sequence[int], penalties_N: Doubles) -> Doubles:
        """The reward stands at an answer's last token, penalties at every one."""
        rewards_N = np.zeros(sum(sizes)) if not len(penalties_N) else -penalties_N
        rewards_N[np.cumsum(sizes) - 1] += np.nan_to_num(groups.rewards_A)
        return advantages.discounted(rewards_N, sizes, self.gamma)

    def _of_answers(self, groups: Groups, baselines: Doubles, sizes: Sequence[int]) -> Doubles:
        match self.estimator:
            case "rloo":
                return advantages.leave_one_out(groups)
            case "remax":
                return advantages.against(groups, baselines)
            case "opo":
                return advantages.length_weighted(groups, sizes)
            case "gpg":
                return advantages.gpg(groups)
            case "grpo_passk":
                return advantages.best_only(groups, scale=self.scale)
            case "reinforce++_baseline":
                return advantages.group_relative(groups, scale="none")
            case _:
                return advantages.group_relative(groups, scale=self.scale)
