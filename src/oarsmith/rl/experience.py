"""A rollout with its rewards: what one or more updates learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from oarsmith.data.policy_batch import Learned
from oarsmith.rl.advantages import Doubles
from oarsmith.rl.completion import Scores
from oarsmith.rl.prompts import Asked
from oarsmith.rl.rollout import Written

# Of ``Learned``, in the order in which they are kept.
_BY_TOKEN = ("sampled", "old", "reference", "advantages", "weights")
_BY_CRITIC = ("values", "returns")


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Prompts, their answers and rewards, before anything is learned from them.

    Attributes:
        groups: answers by prompt.
        scores: of all answers, prompt by prompt.
        baselines: rewards of greedy answers, where the algorithm asks for them; nan: none.
        numbers: of the prompts in their order without end.
        drawn: prompts that were asked for it, those of dropped groups included.
        version: updates that the weights had seen which wrote it.
        sampling_seconds, reward_seconds: how long it took.
    """

    prompts: tuple[Asked, ...]
    groups: tuple[tuple[Written, ...], ...]
    scores: Scores
    baselines: tuple[float, ...]
    drawn: int
    version: int
    numbers: tuple[int, ...]
    sampling_seconds: float = 0.0
    reward_seconds: float = 0.0

    @property
    def answers(self) -> list[Written]:
        """All, prompt by prompt."""
        return [written for group in self.groups for written in group]

    @property
    def rewards(self) -> Doubles:
        """[answers]; nan: none."""
        return self.scores.rewards


@dataclass(frozen=True, kw_only=True)
class Experience:
    """Answers ready to be learned from.

    Attributes:
        answers: those to one prompt side by side.
        groups: answers of each prompt.
        facts: means over the rollout, for the log.
    """

    answers: tuple[Learned, ...]
    groups: tuple[int, ...]
    facts: Mapping[str, float]


def to_tensors(experience: Experience) -> dict[str, Tensor]:
    """As flat tensors, for a checkpoint."""
    answers = experience.answers
    found = {
        "prompt": torch.from_numpy(np.concatenate([answer.prompt for answer in answers])),
        "prompt_sizes": torch.tensor([len(answer.prompt) for answer in answers]),
        "ids": torch.from_numpy(np.concatenate([answer.ids for answer in answers])),
        "sizes": torch.tensor([len(answer.ids) for answer in answers]),
        "own": torch.from_numpy(np.concatenate([answer.own for answer in answers]).astype(np.uint8)),
        "groups": torch.tensor(experience.groups),
    }
    for name in (*_BY_TOKEN, *(_BY_CRITIC if len(answers[0].values) else ())):
        found[name] = torch.from_numpy(np.concatenate([getattr(answer, name) for answer in answers]))
    return found


def from_tensors(tensors: Mapping[str, Tensor], where: Sequence[str], facts: Mapping[str, float]) -> Experience:
    """What ``to_tensors`` made."""
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    ends, prompt_ends = np.cumsum(arrays["sizes"]), np.cumsum(arrays["prompt_sizes"])
    groups = tuple(arrays["groups"].tolist())
    owner = np.repeat(np.arange(len(groups)), groups)
    prompts: dict[int, np.ndarray] = {}
    answers, at = [], 0
    for number, (end, prompt_end) in enumerate(zip(ends.tolist(), prompt_ends.tolist(), strict=True)):
        ids = arrays["ids"][end - int(arrays["sizes"][number]) : end]
        own = arrays["own"][end - len(ids) : end].astype(np.bool_)
        prompt = arrays["prompt"][prompt_end - int(arrays["prompt_sizes"][number]) : prompt_end]
        # One object for a group: that is how a batch sees that they share it.
        prompt = prompts.setdefault(int(owner[number]), prompt)
        count = int(own.sum())
        names = (*_BY_TOKEN, *(name for name in _BY_CRITIC if name in arrays))
        parts = {name: arrays[name][at : at + count] for name in names}
        answers.append(Learned(prompt=prompt, ids=ids, own=own, where=where[number], **parts))
        at += count
    return Experience(answers=tuple(answers), groups=groups, facts=facts)
