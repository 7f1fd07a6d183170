"""Steps requests through the decoder: one token stream a step, prompts and single tokens side by side, no padding.

Shapes: T tokens of a step, N sequences of a step, S slots, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import Tensor

from oarsmith.engine.request import Request
from oarsmith.engine.sampler import choose, penalize
from oarsmith.engine.sampling import Sampling
from oarsmith.errors import ModelError
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
        self._seen_SV: Tensor | None = None
        if sampling.repetition_penalty != 1:
            size = (num_slots, model.spec.vocab_size)
            self._seen_SV = torch.zeros(size, dtype=torch.bool, device=self._device)

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
        tokens = self._choose(self._model.logits(hidden_TD).float(), slots, requests)
        finished = []
        for slot, request, token in zip(slots, requests, tokens, strict=True):
            request.accept(token)
            if request.finish_reason is not None:
                del self._running[slot]
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
            if self._seen_SV is not None:
                self._seen_SV[slot] = False
                self._seen_SV[slot, torch.tensor(request.prompt, device=self._device)] = True

    def _unread(self, slot: int, request: Request) -> list[int]:
        """What the model reads next of a request: all of it once more where its cached keys have become void."""
        if not request.ids or self._cache.used[slot] != self._reread_after:
            return request.unread
        self._cache.used[slot] = 0
        return [*request.prompt, *request.ids]

    def _choose(self, logits_NV: Tensor, slots: list[int], requests: list[Request]) -> list[int]:
        if not bool(logits_NV.amax(-1).isfinite().all()):
            raise ModelError(
                "the model's logits are not finite (NaN or infinite)",
                fix="load it with dtype fp32; if that does not help, the weights are damaged",
            )
        sampling = self._sampling
        if self._seen_SV is not None:
            logits_NV = penalize(logits_NV, self._seen_SV[slots], sampling.repetition_penalty)
        draws = [0.0 if sampling.temperature == 0 else request.uniform() for request in requests]
        uniform_N = torch.tensor(draws, dtype=torch.float64, device=self._device)
        tokens_N = choose(logits_NV, sampling, uniform_N)
        if self._seen_SV is not None:
            self._seen_SV[torch.tensor(slots, device=self._device), tokens_N] = True
        tokens: list[int] = tokens_N.tolist()
        return tokens
