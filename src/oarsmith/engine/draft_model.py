"""A small model that guesses for a large one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from oarsmith.engine.backend import Backend, Part
from oarsmith.engine.sampler import propose
from oarsmith.engine.state import SamplingState
from oarsmith.engine.step import Chunk, Step
from oarsmith.errors import OarsmithError
from oarsmith.models.facts import ModelFacts


@dataclass
class _Guess:
    """A piece that is guessed for, and what the choice of its next token depends on."""

    chunk: Chunk
    state: SamplingState

    @property
    def wants(self) -> bool:
        """Whether there is a token to be guessed after the last one."""
        chunk = self.chunk
        ended = bool(chunk.drafts) and chunk.drafts[-1].token in chunk.request.stop_ids
        return len(chunk.drafts) < chunk.room and not ended


class ModelDrafter:
    """Reads what the model reads, and draws guesses from its own distribution, bent as the request's sampling says.

    Its keys lie in pages with the numbers of the model's own: a page that is found, shared or copied is so for both.

    Args:
        backend: the draft model over a cache of as many rows and pages.
        facts: the draft model's.
        vocab_size: the model's; the draft model's may be padded otherwise.
    """

    def __init__(self, backend: Backend, facts: ModelFacts, vocab_size: int) -> None:
        self.backends = (backend,)
        self._backend = backend
        self._context = facts.max_positions
        self._own_size = facts.vocab_size
        self._vocab_size = vocab_size

    @torch.inference_mode()
    def draft(self, step: Step) -> None:
        guesses, places = self._read(step)
        while guesses:
            self._propose(guesses, places)
            guesses = [guess for guess in guesses if guess.wants and self._has_room(guess.chunk)]
            if guesses:
                self._backend.compute([self._last(guess.chunk) for guess in guesses])
                places = list(range(len(guesses)))
        for chunk in step.chunks:
            if chunk.drafts:
                chunk.request.num_followed = chunk.stop + len(chunk.drafts) - 1

    def _read(self, step: Step) -> tuple[list[_Guess], list[int]]:
        """Read what the step reads; the pieces to guess for, and the places of their last tokens."""
        parts, chunks = [], []
        for chunk in step.chunks:
            request, stop = chunk.request, min(chunk.stop, self._context)
            start = min(chunk.start, request.num_followed)
            if start < stop:
                parts.append(self._part(chunk, request.tokens[start:stop], start))
                chunks.append(chunk)
                request.num_followed = stop
        if not parts:
            return [], []
        self._backend.compute(parts)
        ends = accumulate(len(part.tokens) for part in parts)
        asking = [(chunk, end - 1) for chunk, end in zip(chunks, ends, strict=True) if self._has_room(chunk)]
        guesses = [_Guess(chunk, chunk.request.state.fork()) for chunk, _ in asking]
        return guesses, [place for _, place in asking]

    def _has_room(self, chunk: Chunk) -> bool:
        """Whether the last token, known or guessed, is within the draft model's context, and a guess is wanted."""
        return len(chunk.drafts) < chunk.room and chunk.stop + len(chunk.drafts) <= self._context

    def _last(self, chunk: Chunk) -> Part:
        place = chunk.stop + len(chunk.drafts) - 1
        return self._part(chunk, [chunk.drafts[-1].token], place)

    def _part(self, chunk: Chunk, tokens: Sequence[int], start: int) -> Part:
        request = chunk.request
        assert request.row is not None and request.table is not None, request.id
        # The other model's padding has no meaning here either.
        known = [min(token, self._own_size - 1) for token in tokens]
        return Part(known, start, request.row, request.table.pages, request.prompt_size)

    def _propose(self, guesses: list[_Guess], places: Sequence[int]) -> None:
        """One more token for each; who has none, because its logits or its constraint fail, is left out."""
        logits_NV = self._fitted(self._backend.logits(places).tensor)
        finite = logits_NV.amax(-1).isfinite()
        if not bool(finite.all()):
            guesses[:] = [guess for guess, usable in zip(guesses, finite.tolist(), strict=True) if usable]
            logits_NV = logits_NV[finite]
        going = []
        for guess, draft in zip(guesses, propose(logits_NV, [guess.state for guess in guesses]), strict=True):
            try:
                guess.state.accept(draft.token)
            except OarsmithError:
                continue
            guess.chunk.drafts.append(draft)
            going.append(guess)
        guesses[:] = going

    def _fitted(self, logits_NV: Tensor) -> Tensor:
        """Logits of the model's vocabulary."""
        missing = self._vocab_size - logits_NV.shape[1]
        return torch.nn.functional.pad(logits_NV, (0, missing), value=-torch.inf) if missing else logits_NV
