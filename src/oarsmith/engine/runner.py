"""Steps requests through the decoder: one token stream a step, prompts and single tokens side by side, no padding.

Shapes: T tokens of a step, N sequences of a step, S slots, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import accumulate

import torch

from oarsmith.engine.request import Request
from oarsmith.engine.sampler import SamplingState, choose
from oarsmith.engine.sampling import Sampling
from oarsmith.models.decoder import Decoder
from oarsmith.models.spec import reread_after

# Prompt tokens that enter in one step, unless a single prompt is longer: bounds the memory of a prefill.
PREFILL_TOKENS = 4096


class Runner:
    """Works on up to ``num_slots`` requests at a time; one that ends gives its place to the next.

    Args:
        requests: in the order in which they start.
    """

    @torch.inference_mode()
    def __init__(self, model: Decoder, sampling: Sampling, requests: Iterable[Request], num_slots: int) -> None:
        self._model = model
        self._sampling = sampling
        self._waiting = deque(requests)
        self._running: dict[int, Request] = {}
        num_slots = min(num_slots, len(self._waiting))
        self._free = list(range(num_slots))[::-1]
        capacity = max((request.room for request in self._waiting), default=1)
        self._cache = model.new_cache(num_slots, capacity)
        self._reread_after = reread_after(model.spec)
        self._device = model.device
        self._states: dict[int, SamplingState] = {}

    @property
    def busy(self) -> bool:
        """Whether any request is not finished."""
        return bool(self._running or self._waiting)

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """One more token for every running request; returns those that are finished with it.

        Raises:
            ModelError: the logits are not numbers.
        """
        self._admit()
        slots, requests = list(self._running), list(self._running.values())
        unread = [self._unread(slot, request) for slot, request in self._running.items()]
        counts = [len(ids) for ids in unread]
        ids_T = torch.tensor([index for ids in unread for index in ids], device=self._device)
        hidden_TD = self._model.hidden(ids_T, self._cache.extend(counts, slots), self._cache)
        if len(hidden_TD) > len(counts):
            last_N = torch.tensor([end - 1 for end in accumulate(counts)], device=self._device)
            hidden_TD = hidden_TD[last_N]
        choices = choose(self._model.logits(hidden_TD), [self._states[slot] for slot in slots])
        finished = []
        for slot, request, choice in zip(slots, requests, choices, strict=True):
            request.accept(choice.token)
            self._states[slot].accept(choice.token)
            if request.finish_reason is not None:
                del self._running[slot], self._states[slot]
                self._free.append(slot)
                finished.append(request)
        return finished

    def _admit(self) -> None:
        num_tokens = 0
        while self._waiting and self._free:
            num_tokens += len(self._waiting[0].prompt)
            if num_tokens > PREFILL_TOKENS and num_tokens > len(self._waiting[0].prompt):
                return
            slot, request = self._free.pop(), self._waiting.popleft()
            self._running[slot] = request
            self._cache.used[slot] = 0
            vocab_size = self._model.spec.vocab_size
            self._states[slot] = SamplingState(self._sampling, request.prompt, request.generator, vocab_size=vocab_size)

    def _unread(self, slot: int, request: Request) -> list[int]:
        """What the model reads next of a request: all of it once more where its cached keys have become void."""
        if not request.ids or self._cache.used[slot] != self._reread_after:
            return request.unread
        self._cache.used[slot] = 0
        return [*request.prompt, *request.ids]
