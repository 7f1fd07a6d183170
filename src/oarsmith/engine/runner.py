"""Computes the scheduler's steps: one token stream a step, prompts and single tokens side by side, no padding.

Shapes: T tokens of a prompt, N rows that need logits, V vocabulary.
"""

from __future__ import annotations

from itertools import accumulate

import torch

from oarsmith.engine.backend import Backend, Part
from oarsmith.engine.request import Request
from oarsmith.engine.sampler import choose, prompt_logprobs
from oarsmith.engine.scheduler import Chunk, Scheduler, Step
from oarsmith.errors import ModelError

# Rows of logits at a time where those of a whole prompt are looked at: 50 MB of them at V = 49,152.
PROMPT_ROWS = 256


class Runner:
    """What computes, and the scheduler that says what."""

    def __init__(self, backend: Backend, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._backend = backend
        self._late: list[Request] = []

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Compute one step; the requests that got a token by it, or an error.

        Those that are done have left the scheduler. What interrupts a step costs time only: it is computed again.
        """
        late, self._late = self._late, []
        step = self.scheduler.schedule()
        if not step.chunks:
            return late
        complete = False
        try:
            self._compute(step)
            self.scheduler.done(step)
            advanced = self._choose(step)
            complete = True
        finally:
            if not complete:
                self._late = late
                self._recover()
        return [*late, *advanced]

    def _recover(self) -> None:
        """After an interruption: who is done leaves and is told of in the next step, the others begin again."""
        for request in list(self.scheduler.running):
            # Siblings part once there is a token of the first; those that have none yet read the prompt themselves.
            siblings, request.siblings = (request.siblings, []) if request.num_generated else ([], request.siblings)
            self._late += [member for member in (request, *siblings) if member.done]
            for sibling in siblings:
                if not sibling.done:
                    self.scheduler.add(sibling)
            if request.done:
                self.scheduler.remove(request)
            else:
                self.scheduler.preempt(request)

    def _compute(self, step: Step) -> None:
        for source, target in step.copies:
            self._backend.copy_page(source, target)
        parts = []
        for chunk in step.chunks:
            request = chunk.request
            assert request.row is not None and request.table is not None, request.id
            tokens = request.tokens[chunk.start : chunk.stop]
            parts.append(Part(tokens, chunk.start, request.row, request.table.pages, request.prompt_size))
        self._backend.compute(parts)

    def _choose(self, step: Step) -> list[Request]:
        """Let every sequence whose last token was computed take the next one."""
        ends = list(accumulate(chunk.stop - chunk.start for chunk in step.chunks))
        for chunk, end in zip(step.chunks, ends, strict=True):
            if chunk.request.wants_all_logits:
                self._look_back(chunk, end - chunk.stop)
        last = [(end - 1, chunk.request) for chunk, end in zip(step.chunks, ends, strict=True) if chunk.complete]
        if not last:
            return []
        logits_NV = self._backend.logits([place for place, _ in last])
        # Siblings of a prompt that was just read choose from the same logits.
        groups = [[request, *request.siblings] for _, request in last]
        finite = logits_NV.amax(-1).isfinite().tolist()
        chosen = [(row, request) for row, group in enumerate(groups) if finite[row] for request in group]
        if len(chosen) != len(logits_NV):
            logits_NV = logits_NV[torch.tensor([row for row, _ in chosen], dtype=torch.int64, device=logits_NV.device)]
        if chosen:
            choices = choose(logits_NV, [request.state for _, request in chosen])
            for (_, request), choice in zip(chosen, choices, strict=True):
                request.accept(choice)
        for row, group in enumerate(groups):
            self._settle(group, finite=finite[row])
        return [request for group in groups for request in group]

    def _settle(self, group: list[Request], *, finite: bool) -> None:
        """Let siblings go on by themselves, and those that are done leave."""
        leader, *siblings = group
        leader.siblings = []
        for request in group if not finite else ():
            request.error = ModelError(
                "the model's logits are not finite (NaN or infinite)",
                where=request.id,
                fix="load it with dtype fp32; if that does not help, the weights are damaged",
            )
        for sibling in siblings:
            if not sibling.done and self.scheduler.fork(leader, sibling):
                assert leader.row is not None and sibling.row is not None, leader.id
                self._backend.copy_sequence(leader.row, sibling.row)
        if leader.done:
            self.scheduler.remove(leader, failed=not finite)

    def _look_back(self, chunk: Chunk, offset: int) -> None:
        """What the model thought of the prompt's tokens: its place i in the step, plus ``offset``, speaks of i + 1."""
        request = chunk.request
        assert request.prompt_logprobs is not None, request.id
        # Read again after its pages were lost: what is known stays.
        start, stop = len(request.prompt_choices), min(chunk.stop, len(request.prompt) - 1)
        for first in range(max(start, chunk.start), stop, PROMPT_ROWS):
            end = min(first + PROMPT_ROWS, stop)
            logits_TV = self._backend.logits(range(first + offset, end + offset))
            targets_T = torch.tensor(request.prompt[first + 1 : end + 1], device=logits_TV.device)
            request.prompt_choices += prompt_logprobs(logits_TV, targets_T, request.prompt_logprobs)
