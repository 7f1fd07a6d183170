"""From a scored rollout to PPO's advantages and returns: a KL penalty by token, the score at the end, GAE.

Shapes: N tokens that the model wrote, end to end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from oarsmith.data.policy_batch import Learned
from oarsmith.models.decoder import Decoder
from oarsmith.rl import advantages
from oarsmith.rl.advantages import Doubles, Groups
from oarsmith.rl.critic import Critic
from oarsmith.rl.experience import Experience, Scored
from oarsmith.rl.study import Student


@dataclass(kw_only=True)
class KLController:
    """The coefficient of the KL penalty; with a target it follows it (Ziegler et al. 2019, section 2.2).

    Args:
        target: KL of an answer (nats) that is aimed at; None: the coefficient stays.
        horizon: answers over which it can change by the size of the error.
    """

    coef: float
    target: float | None = None
    horizon: int = 10_000

    def learn(self, kl: float, count: int) -> None:
        """``kl``: mean of ``count`` answers."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * count / self.horizon


@dataclass(kw_only=True)
class RunningScale:
    """Mean and deviation of all rewards so far (Welford 1962)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def take(self, rewards: Doubles) -> None:
        """Count these in."""
        for value in rewards[~np.isnan(rewards)].tolist():
            self.count += 1
            away = value - self.mean
            self.mean += away / self.count
            self.squares += away * (value - self.mean)

    def scaled(self, rewards: Doubles) -> Doubles:
        """(r - mean) / deviation."""
        deviation = (self.squares / max(self.count - 1, 1)) ** 0.5
        return (rewards - self.mean) / (deviation + 1e-8)


@dataclass(frozen=True, kw_only=True)
class PpoStudent:
    """Studies rollouts with a critic.

    Args:
        base: gives log-probabilities and facts.
        clip_score: scores are held within plus and minus this; None: they are not.
        normalize: scores become (r - mean) / deviation of all so far, before the clip.
        whiten: advantages of all tokens get mean 0 and deviation 1.
        no_end_penalty: taken from the score of an answer that the limit ended.
    """

    base: Student
    critic: Critic
    model: Decoder
    kl: KLController
    gamma: float
    lam: float
    clip_score: float | None
    normalize: bool
    whiten: bool
    no_end_penalty: float = 0.0
    running: RunningScale = field(default_factory=RunningScale)

    def __call__(self, scored: Scored, updates: int) -> Experience:
        """See ``Student``."""
        answers = self.base.prepare(scored)
        sizes = [int(answer.own.sum()) for answer in answers]
        referee = self.base.referee
        values = self.critic.judge(self.model, answers, capacity=referee.capacity, share=referee.share)
        values_N = np.concatenate(values).astype(np.float64)
        scores_A, ratios_N = self._scores(scored), self._log_ratios(answers)
        rewards_N = -self.kl.coef * ratios_N
        rewards_N[np.cumsum(sizes) - 1] += np.nan_to_num(scores_A)
        found_N, returns_N = advantages.gae(rewards_N, values_N, sizes, gamma=self.gamma, lam=self.lam)
        if self.whiten:
            found_N = advantages.whitened(found_N, np.repeat(~np.isnan(scores_A), sizes))
        ends = np.cumsum(sizes)[:-1]
        parts = (np.split(x.astype(np.float32), ends) for x in (values_N, returns_N))
        answers = [replace(answer, values=own, returns=due) for answer, own, due in zip(answers, *parts, strict=True)]
        kl = float(np.add.reduceat(ratios_N, np.cumsum([0, *sizes[:-1]])).mean())
        more = {"kl_of_answers": kl, "kl_coeff": self.kl.coef, "return": float(returns_N.mean())}
        self.kl.learn(kl, len(answers))
        groups = Groups(scored.rewards, tuple(len(group) for group in scored.groups))
        return self.base.finish(scored, answers, groups, found_N, updates, more)

    def _scores(self, scored: Scored) -> Doubles:
        rewards = scored.rewards
        if self.normalize:
            self.running.take(rewards)
            rewards = self.running.scaled(rewards)
        if self.clip_score is not None:
            rewards = rewards.clip(-self.clip_score, self.clip_score)
        cut = np.array([written.truncated for written in scored.answers], dtype=np.float64)
        found: Doubles = rewards - self.no_end_penalty * cut
        return found

    def _log_ratios(self, answers: Sequence[Learned]) -> Doubles:
        """log p - log p_reference of each token; 0 without a reference."""
        if not self.base.judged:
            return np.zeros(sum(int(answer.own.sum()) for answer in answers))
        return np.concatenate([answer.old.astype(np.float64) - answer.reference for answer in answers])

    def state(self) -> dict[str, float]:
        """What a resume needs."""
        running = self.running
        return {"kl": self.kl.coef, "count": running.count, "mean": running.mean, "squares": running.squares}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Go on from it."""
        self.kl.coef = state["kl"]
        self.running.count, self.running.mean = state["count"], state["mean"]
        self.running.squares = state["squares"]
