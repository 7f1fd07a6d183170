"""From a scored rollout to what updates learn from: log-probabilities, advantages, weights, and facts for the log.

Shapes: A answers; N tokens that the model wrote, end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from oarsmith.data.policy_batch import Floats, Learned
from oarsmith.losses.policy.weights import Aggregation, token_weights
from oarsmith.rl.advantages import Doubles, Groups
from oarsmith.rl.experience import Experience, Scored
from oarsmith.rl.learning import Outcomes, Teacher
from oarsmith.rl.prompts import Asked
from oarsmith.rl.referee import Referee
from oarsmith.rl.rollout import Written


@dataclass(frozen=True, kw_only=True)
class Student:
    """Studies rollouts.

    Args:
        referee: scores answers under policy and reference.
        old: whose log-probabilities ratios are taken to: ``sampler``, ``trainer``, or ``none`` where each rollout is
            learned from once, by the policy that wrote it.
        judged: whether the reference is asked; ``kl_coef``: what its KL term takes from rewards, by token.
        aggregation, longest: see ``token_weights``.
        filter_truncated: answers that the limit ended do not count.
        passing: an answer passes with at least this reward.
    """

    teacher: Teacher
    referee: Referee
    old: str
    judged: bool
    kl_coef: float
    aggregation: Aggregation
    longest: int
    filter_truncated: bool
    passing: float

    def __call__(self, scored: Scored, updates: int) -> Experience:
        """``updates``: that the weights have seen by now."""
        answers = self.prepare(scored)
        groups = Groups(scored.rewards, tuple(len(group) for group in scored.groups))
        sizes = tuple(int(answer.own.sum()) for answer in answers)
        advantages_N = self.teacher.advantages(
            Outcomes(groups=groups, sizes=sizes, baselines=scored.baselines, penalties_N=self._penalties(answers))
        )
        return self.finish(scored, answers, groups, advantages_N, updates, {})

    def state(self) -> dict[str, float]:
        """Nothing here changes."""
        return {}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Nothing here changes."""

    def prepare(self, scored: Scored) -> list[Learned]:
        """The answers with the log-probabilities that are asked for."""
        answers = answers_of(scored.prompts, scored.groups)
        if self.old == "trainer":
            answers = _with(answers, self.referee.policy(answers), lambda a, found: replace(a, old=found))
        elif self.old == "sampler":
            answers = [replace(answer, old=answer.sampled) for answer in answers]
        if self.judged:
            answers = _with(answers, self.referee.judged(answers), lambda a, found: replace(a, reference=found))
        return answers

    def finish(
        self,
        scored: Scored,
        answers: Sequence[Learned],
        groups: Groups,
        advantages_N: Doubles,
        updates: int,
        more: Mapping[str, float],
    ) -> Experience:
        """With advantages, weights and facts. ``more``: further facts."""
        sizes = tuple(int(answer.own.sum()) for answer in answers)
        truncated = [written.truncated for written in scored.answers]
        kept = [not (self.filter_truncated and over) for over in truncated]
        kept = [use and not np.isnan(reward) for use, reward in zip(kept, groups.rewards_A, strict=True)]
        weights_N, _ = token_weights(self.aggregation, sizes, kept=kept, longest=self.longest)
        ends = np.cumsum(sizes)[:-1]
        by_answer = zip(np.split(advantages_N, ends), np.split(weights_N.numpy(), ends), strict=True)
        learned = tuple(
            replace(answer, advantages=advantages.astype(np.float32), weights=weights)
            for answer, (advantages, weights) in zip(answers, by_answer, strict=True)
        )
        facts = facts_of(scored, groups, passing=self.passing) | {"staleness": float(updates - scored.version)}
        return Experience(answers=learned, groups=groups.sizes, facts=facts | dict(more))

    def _penalties(self, answers: Sequence[Learned]) -> Doubles:
        if self.kl_coef == 0:
            return np.zeros(0)
        before = [answer.sampled if self.old != "trainer" else answer.old for answer in answers]
        ratios = [own.astype(np.float64) - answer.reference for own, answer in zip(before, answers, strict=True)]
        return self.kl_coef * np.concatenate(ratios)


def facts_of(scored: Scored, groups: Groups, *, passing: float) -> dict[str, float]:
    """Means over a rollout: rewards (each function's as ``reward/NAME``), share of answers that pass, lengths, share
    that the limit ended, share of prompts whose answers all have the same reward."""
    rewards, answers = groups.rewards_A, scored.answers
    known = rewards[~np.isnan(rewards)]
    lengths = np.array([written.num_own for written in answers])
    # Where a prompt has one answer, all of the rollout are compared with one another.
    varied = groups.varied if max(groups.sizes) > 1 else Groups(rewards, (len(rewards),)).varied
    found = {
        "reward": float(known.mean()) if len(known) else 0.0,
        "reward_std": float(known.std()) if len(known) else 0.0,
        "pass_rate": float((known >= passing).mean()) if len(known) else 0.0,
        "length": float(lengths.mean()),
        "truncated": float(np.mean([written.truncated for written in answers])),
        "no_variance": 1.0 - float(np.mean(varied)),
        "prompts_drawn": float(scored.drawn),
    }
    if len(scored.scores.parts) > 1:
        for name, values in scored.scores.parts.items():
            given = [value for value in values if value is not None]
            found[f"reward/{name}"] = float(np.mean(given)) if given else 0.0
    if max(written.num_turns for written in answers) > 1:
        found["turns"] = float(np.mean([written.num_turns for written in answers]))
    return found


def answers_of(prompts: Sequence[Asked], groups: Sequence[Sequence[Written]]) -> list[Learned]:
    """What was written, with nothing known of it but what the sampler said."""
    found, nothing = [], np.zeros(0, np.float32)
    for asked, group in zip(prompts, groups, strict=True):
        prompt = np.array(asked.ids, np.int32)
        for written in group:
            ids, own, logprobs = written.arrays()
            unknown = np.full(int(own.sum()), np.nan, np.float32)
            found.append(
                Learned(
                    prompt=prompt,
                    ids=ids,
                    own=own,
                    sampled=logprobs[own],
                    old=unknown,
                    reference=unknown,
                    advantages=nothing,
                    weights=nothing,
                    where=asked.where,
                )
            )
    return found


def _with(
    answers: Sequence[Learned], found: Sequence[Floats], put: Callable[[Learned, Floats], Learned]
) -> list[Learned]:
    return [put(answer, own) for answer, own in zip(answers, found, strict=True)]
