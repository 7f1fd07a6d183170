"""Rollouts: groups of answers to prompts, as they were sampled, token by token.

Tokens are kept as they were drawn, each with its log-probability, and never spelled and read again. What an environment
puts between a model's turns is part of an answer and marked as not its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from oarsmith.engine import Sampling
from oarsmith.engine.request import Completion as Generated
from oarsmith.rl.policy import Policy
from oarsmith.rl.prompts import Asked


class Conversation(Protocol):
    """One answer's counterpart: an environment that speaks when the model's turn has ended."""

    def continue_with(self, written: Sequence[int], *, truncated: bool) -> Sequence[int] | None:
        """The tokens that follow the model's turn ``written``, up to where it may write again; None: the answer is
        over. ``truncated``: a limit of length ended the turn, and it is over in any case."""

    @property
    def reward(self) -> float | None:
        """What the turns were worth so far; None: nothing was said."""

    @property
    def cut(self) -> bool:
        """Whether it was over by a limit."""


class Conversations(Protocol):
    """Makes a counterpart for every answer."""

    def begin(self, asked: Asked) -> Conversation: ...


@dataclass(slots=True, eq=False)
class Written:
    """An answer.

    Attributes:
        ids: its tokens; ``own``: which of them the model wrote; ``logprobs``: of those, natural logarithms in the
            model's own distribution as the sampler saw it; 0 for the others.
        text: without the model's end tokens.
        truncated: a limit ended it.
        num_turns: times that the model wrote.
        reward: what an environment gave.
    """

    ids: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    truncated: bool = False
    num_turns: int = 0
    reward: float | None = None

    def take(self, generated: Generated) -> None:
        """A turn of the model."""
        assert generated.logprobs is not None
        self.ids += generated.ids
        self.own += [True] * len(generated.ids)
        self.logprobs += [choice.logprob if choice.logprob is not None else 0.0 for choice in generated.logprobs]
        self.text += generated.text
        self.truncated = generated.finish_reason == "length"
        self.num_turns += 1

    def append(self, ids: Sequence[int], text: str) -> None:
        """What the environment says."""
        self.ids += ids
        self.own += [False] * len(ids)
        self.logprobs += [0.0] * len(ids)
        self.text += text

    @property
    def num_own(self) -> int:
        """Tokens that the model wrote."""
        return sum(self.own)

    def arrays(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
        """Ids, own and log-probabilities."""
        return np.array(self.ids, np.int32), np.array(self.own, np.bool_), np.array(self.logprobs, np.float32)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Answers prompts in groups.

    Args:
        policy: its engine reads a group's prompt once, and works on all answers side by side.
        sampling: of the answers; its ``n`` and ``seed`` are set here.
        max_length: tokens of a prompt with its whole answer, over all turns.
        conversations: who speaks between the model's turns; None: an answer is one turn.
    """

    policy: Policy
    sampling: Sampling
    max_length: int
    conversations: Conversations | None = None

    def sample(self, prompts: Sequence[Asked], count: int, seed: int, *, greedy: bool = False) -> list[list[Written]]:
        """``count`` answers to each prompt. The same seed over the same weights gives the same answers."""
        sampling = replace(self.sampling, seed=seed, n=count, logprobs=0)
        if greedy:
            sampling = replace(sampling, n=1, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
        with self.policy.answering():
            return self._sample(prompts, sampling, seed)

    def _sample(self, prompts: Sequence[Asked], sampling: Sampling, seed: int) -> list[list[Written]]:
        found: list[list[Written]] = []
        for generated in self.policy.engine.generate([asked.ids for asked in prompts], sampling):
            group = [Written() for _ in range(1 + len(generated.others))]
            for written, each in zip(group, (generated, *generated.others), strict=True):
                written.take(each)
            found.append(group)
        if self.conversations is not None:
            self._go_on(prompts, found, sampling, seed)
        return found

    def _go_on(self, prompts: Sequence[Asked], found: list[list[Written]], sampling: Sampling, seed: int) -> None:
        """Turn after turn, until every answer is over; those that go on are worked on together."""
        assert self.conversations is not None
        pairs = [(asked, written) for asked, group in zip(prompts, found, strict=True) for written in group]
        active = [(asked, written, self.conversations.begin(asked), 0) for asked, written in pairs]
        turn = 0
        while active:
            turn += 1
            going = []
            for asked, written, other, start in active:
                more = other.continue_with(written.ids[start:], truncated=written.truncated)
                room = self.max_length - len(asked.ids) - len(written.ids) - len(more or ())
                written.reward, written.truncated = other.reward, other.cut or (more is not None and room < 1)
                if more is not None and room > 0:
                    written.append(more, self._spell(more))
                    going.append((asked, written, other, room))
            if not going:
                return
            step = replace(sampling, n=1, seed=seed + turn)
            limits = [min(sampling.max_new_tokens, room) for *_, room in going]
            answers = self.policy.engine.generate(
                [[*asked.ids, *written.ids] for asked, written, _, _ in going],
                [replace(step, max_new_tokens=limit) for limit in limits],
            )
            active = []
            for (asked, written, other, _), generated in zip(going, answers, strict=True):
                start = len(written.ids)
                written.take(generated)
                active.append((asked, written, other, start))

    def _spell(self, ids: Sequence[int]) -> str:
        tokenizer = self.policy.engine.tokenizer
        return "" if tokenizer is None else tokenizer.decode(list(ids), skip_special_tokens=False)
