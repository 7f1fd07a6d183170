"""The batches of ``oarsmith grpo``: rollouts, and the updates that learn from each of them.

A rollout of P prompts with G answers each is learned from in ``iters`` passes, each in updates of ``per_update``
prompts, each update in ``passes`` batches. Everything random is keyed by (seed, purpose, number of the rollout), so a
run that is resumed goes on bitwise: what a rollout has left, and one that is made meanwhile, are in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from oarsmith.data.batch import Batch
from oarsmith.data.order import permutation, require_same_plan
from oarsmith.data.policy_batch import Learned, make_policy_batch
from oarsmith.losses.policy.weights import Aggregation, count_of
from oarsmith.rl.collect import Collector
from oarsmith.rl.experience import Experience, Scored, from_tensors, to_tensors
from oarsmith.rl.pending import KEY, Pending, scored_from_tensor, scored_to_tensor
from oarsmith.rl.prompts import PromptOrder
from oarsmith.training.batches import KeepingBatches

_NOTHING = 1e-9


class Study(Protocol):
    """What is learned from a rollout."""

    def __call__(self, scored: Scored, updates: int) -> Experience:
        """``updates``: that the weights have seen by now."""
        ...

    def state(self) -> dict[str, float]:
        """What a resume needs."""
        ...

    def load_state(self, state: Mapping[str, float]) -> None:
        """Go on from it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a rollout becomes batches.

    Args:
        prompts: of a rollout; ``per_update``: of an update; ``passes``: batches of an update.
        iters: times that a rollout is gone through.
        aggregation: see ``losses/policy/weights.py``; ``longest``: the limit of an answer.
        ahead: the next rollout is made while this one is learned from.
        share: whether a prompt is read once for its answers.
    """

    prompts: int
    per_update: int
    passes: int
    iters: int
    aggregation: Aggregation
    longest: int
    seed: int
    ahead: bool = False
    share: bool = True

    @property
    def updates(self) -> int:
        """Of a rollout."""
        return self.iters * -(-self.prompts // self.per_update)

    @property
    def settings(self) -> dict[str, Any]:
        """What the place of a checkpoint was counted with."""
        return {"seed": self.seed, "prompts_per_step": self.prompts, "updates": self.updates, "passes": self.passes}


class RolloutBatches(KeepingBatches):
    """See above. Iterating gives one update's batches.

    Args:
        refresh: takes the model's weights for the next rollout.
        told: told of every rollout, the step that first learns from it, and its facts.
        companion: texts for batch number so and so of the run, counted over all updates' passes; None: there are none.
        rewind: called with the step that a resume goes on from.

    Attributes:
        last_update: of the run; no rollout is made ahead for what comes after it.
    """

    def __init__(
        self,
        *,
        order: PromptOrder,
        plan: Plan,
        collector: Collector,
        study: Study,
        refresh: Callable[[], None],
        fingerprint: str,
        told: Callable[[Scored, int, Mapping[str, float]], None] = lambda scored, step, facts: None,
        rewind: Callable[[int], None] = lambda step: None,
        companion: Callable[[int], Batch] | None = None,
    ) -> None:
        self._order, self._plan, self._collector, self._study = order, plan, collector, study
        self._refresh, self._fingerprint, self._told, self._rewind = refresh, fingerprint, told, rewind
        self._companion = companion
        self.last_update: int | None = None
        self._epoch = self._position = self._updates = self._drawn = self._rollouts = 0
        self._left: list[list[int]] = []
        self._experience: Experience | None = None
        self._pending = Pending()
        self._saved: tuple[list[str], dict[str, float]] = [], {}

    def batches_per_epoch(self, epoch: int) -> int:
        """As many rollouts as go through all prompts once."""
        return -(-len(self._order) // self._plan.prompts) * self._plan.updates * self._plan.passes

    def __iter__(self) -> Iterator[Batch]:
        if not self._left:
            self._next_rollout()
        experience, chosen = self._experience, self._left.pop(0)
        assert experience is not None
        self._updates += 1
        self._position += self._plan.passes
        if self._position >= self.batches_per_epoch(self._epoch):
            self._epoch, self._position = self._epoch + 1, 0
        yield from self._batches(experience, chosen)

    def _batches(self, experience: Experience, chosen: list[int]) -> Iterator[Batch]:
        starts = np.cumsum([0, *experience.groups])
        answers = [experience.answers[at] for group in chosen for at in range(starts[group], starts[group + 1])]
        parts = np.array_split(np.arange(len(answers)), min(self._plan.passes, len(answers)))
        first = (self._updates - 1) * self._plan.passes
        for number, part in enumerate(parts, first):
            own = [answers[at] for at in part]
            # Where nothing of a step counts its mean is 0, and not undefined.
            count = max(_count(own, self._plan), _NOTHING)
            yield make_policy_batch(
                own,
                count=count,
                facts=experience.facts,
                share=self._plan.share,
                companion=None if self._companion is None else self._companion(number),
            )

    def _next_rollout(self) -> None:
        """Learn from the one that is ready, or from one that is made now."""
        if self._pending.there:
            scored = self._pending.take()
        else:
            self._refresh()
            scored = self._collector.collect(self._drawn, self._updates)
        self._drawn += scored.drawn
        number, self._rollouts = self._rollouts, self._rollouts + 1
        after = self._updates + self._plan.updates
        if self._plan.ahead and (self.last_update is None or after < self.last_update):
            self._refresh()
            first, version = self._drawn, self._updates
            self._pending.begin(lambda: self._collector.collect(first, version))
        self._experience = self._study(scored, self._updates)
        self._told(scored, self._updates + 1, self._experience.facts)
        self._left = self._minibatches(number, len(scored.prompts))

    def _minibatches(self, number: int, count: int) -> list[list[int]]:
        """Groups of each update; in an order of its own in each pass over the rollout."""
        size, found = self._plan.per_update, []
        for turn in range(self._plan.iters):
            order = list(range(count))
            if size < count:
                order = permutation(count, self._plan.seed, "updates", number * self._plan.iters + turn).tolist()
            found += [sorted(order[at : at + size]) for at in range(0, count, size)]
        return found

    def state(self) -> dict[str, Any]:
        """The place, and what the plan depends on; a rollout on its way is none of it."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "fingerprint": self._fingerprint,
            **self._plan.settings,
            "rollout_updates": self._updates,
            "rollout_drawn": self._drawn,
            "rollouts": self._rollouts,
            "study": self._study.state(),
            "rollout_left": [list(chosen) for chosen in self._left],
            "rollout_facts": dict(self._experience.facts) if self._left and self._experience else {},
            "rollout_where": [answer.where for answer in self._experience.answers]
            if self._left and self._experience
            else [],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to a saved place.

        Raises:
            DataError, ConfigError: the state belongs to other data, or to another plan.
        """
        require_same_plan(state, fingerprint=self._fingerprint, settings=self._plan.settings)
        self._epoch, self._position = state["epoch"], state["position"]
        self._updates, self._drawn = state["rollout_updates"], state["rollout_drawn"]
        self._rollouts, self._left = state["rollouts"], [list(chosen) for chosen in state["rollout_left"]]
        self._saved = state["rollout_where"], state["rollout_facts"]
        self._study.load_state(state["study"])
        self._rewind(self._updates)

    def state_tensors(self) -> dict[str, Tensor]:
        """What is left of a rollout, and the one on its way, which is waited for: it comes next in any case."""
        found: dict[str, Tensor] = {}
        if self._left and self._experience is not None:
            found |= to_tensors(self._experience)
        scored = self._pending.look()
        if scored is not None:
            found[KEY] = scored_to_tensor(scored)
        return found

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        own = {name: tensor for name, tensor in tensors.items() if name != KEY}
        if own:
            where, facts = self._saved
            self._experience = from_tensors(own, where, facts)
        if KEY in tensors:
            self._pending.put(scored_from_tensor(tensors[KEY], lambda number: self._order.take(number, 1)[0]))

    def wait(self) -> None:
        """Until no rollout is on its way, so that the engine is free."""
        self._pending.look()


def _count(answers: list[Learned], plan: Plan) -> float:
    """The part of the step's divisor that answers have."""
    num_used = sum(int(np.count_nonzero(answer.weights)) for answer in answers)
    return count_of(plan.aggregation, num_used, len(answers), plan.longest)
