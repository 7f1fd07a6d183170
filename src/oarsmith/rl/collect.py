"""A rollout with its rewards: ask, answer, score, and ask again where nothing could be learned."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from oarsmith.rl.advantages import Groups
from oarsmith.rl.completion import Completion, Scorer, Scores
from oarsmith.rl.experience import Scored
from oarsmith.rl.prompts import Asked, PromptOrder
from oarsmith.rl.rewards.verifiers.shape import Overlong
from oarsmith.rl.rollout import Sampler, Written
from oarsmith.training.seeds import keyed_seed

Waiting = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True)
class Collector:
    """Makes rollouts.

    Args:
        prompts, samples: how many of a rollout, and answers to each.
        dynamic: groups in which all rewards are the same are left out, and others asked in their place (DAPO).
        scorer: None: environments alone give rewards.
        most_batches: at most this many times as many prompts are asked.
        greedy: whether every prompt also gets a greedy answer, whose reward is its baseline.
        overlong: added to rewards.
        waiting: told what is waited for.
    """

    order: PromptOrder
    sampler: Sampler
    scorer: Scorer | None
    prompts: int
    samples: int
    seed: int
    waiting: Waiting
    dynamic: bool = False
    most_batches: int = 1
    greedy: bool = False
    overlong: Overlong | None = None

    def collect(self, first: int, version: int) -> Scored:
        """A rollout from prompt number ``first`` on."""
        found, asked = _Found(), 0
        while True:
            numbers = list(range(first + asked, first + asked + self.prompts - len(found.prompts)))
            asked += len(numbers)
            last = asked >= self.most_batches * self.prompts
            self._add(found, numbers, version, only_varied=self.dynamic and not last)
            if len(found.prompts) >= self.prompts or last:
                break
        return found.scored(asked, version)

    def _add(self, found: _Found, numbers: Sequence[int], version: int, *, only_varied: bool) -> None:
        prompts = self.order.take(numbers[0], len(numbers))
        begun = time.perf_counter()
        seed = keyed_seed(self.seed, "rollout", numbers[0])
        with self.waiting(f"the engine ({len(prompts) * self.samples} answers)"):
            groups = self.sampler.sample(prompts, self.samples, seed)
            greedy = self.sampler.sample(prompts, 1, seed, greedy=True) if self.greedy else []
        sampled = time.perf_counter()
        with self.waiting("the rewards"):
            scores = score_groups(self.scorer, prompts, groups, version)
            baselines = score_groups(self.scorer, prompts, greedy, version) if self.greedy else None
        found.seconds = found.seconds[0] + sampled - begun, found.seconds[1] + time.perf_counter() - sampled
        varied = Groups(scores.rewards, tuple(len(group) for group in groups)).varied
        found.take(
            numbers,
            prompts,
            groups,
            self._punished(scores, groups),
            None if baselines is None else self._punished(baselines, greedy),
            [index for index, differs in enumerate(varied) if differs or not only_varied],
        )

    def _punished(self, scores: Scores, groups: Sequence[Sequence[Written]]) -> Scores:
        if self.overlong is None:
            return scores
        lengths = [written.num_own for group in groups for written in group]
        pairs = zip(scores.total, lengths, strict=True)
        return replace(scores, total=[None if r is None else r + self.overlong.of(length) for r, length in pairs])


class _Found:
    """Groups of a rollout in the making."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.prompts: list[Asked] = []
        self.groups: list[tuple[Written, ...]] = []
        self.total: list[float | None] = []
        self.parts: dict[str, list[float | None]] = {}
        self.baselines: list[float] = []
        self.seconds = (0.0, 0.0)

    def take(
        self,
        numbers: Sequence[int],
        prompts: Sequence[Asked],
        groups: Sequence[Sequence[Written]],
        scores: Scores,
        baselines: Scores | None,
        chosen: Sequence[int],
    ) -> None:
        """Add the ``chosen`` ones of these groups."""
        parts = Groups(scores.rewards, tuple(len(group) for group in groups)).parts
        for index in chosen:
            self.numbers.append(numbers[index])
            self.prompts.append(prompts[index])
            self.groups.append(tuple(groups[index]))
            self.total += scores.total[parts[index]]
            for name, values in scores.parts.items():
                self.parts.setdefault(name, []).extend(values[parts[index]])
            if baselines is not None:
                self.baselines.append(float(baselines.rewards[index]))

    def scored(self, drawn: int, version: int) -> Scored:
        return Scored(
            prompts=tuple(self.prompts),
            groups=tuple(self.groups),
            scores=Scores(total=self.total, parts=self.parts),
            baselines=tuple(self.baselines),
            drawn=drawn,
            version=version,
            numbers=tuple(self.numbers),
            sampling_seconds=self.seconds[0],
            reward_seconds=self.seconds[1],
        )


def score_groups(
    scorer: Scorer | None, prompts: Sequence[Asked], groups: Sequence[Sequence[Written]], version: int
) -> Scores:
    """Of all answers, prompt by prompt: what the rewards give, and what an environment gave on the way."""
    given = [written.reward for group in groups for written in group]
    nothing = Scores([None] * len(given), {})
    scores = nothing if scorer is None else scorer.score(completions_of(prompts, groups, version))
    if all(value is None for value in given):
        return scores
    pairs = zip(scores.total, given, strict=True)
    total = [own if more is None else more + (own or 0.0) for own, more in pairs]
    return Scores(total, {**scores.parts, "environment": given})


def completions_of(prompts: Sequence[Asked], groups: Sequence[Sequence[Written]], version: int) -> list[Completion]:
    """Answers as rewards see them. ``version``: updates of the run so far."""
    return [
        Completion(
            prompt=asked.text,
            text=written.text,
            token_ids=tuple(written.ids),
            row=asked.row,
            truncated=written.truncated,
            own=tuple(written.own),
            step=version,
        )
        for asked, group in zip(prompts, groups, strict=True)
        for written in group
    ]
