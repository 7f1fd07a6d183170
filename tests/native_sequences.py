"""Sequences that the compiled step works on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oarsmith.engine.backend import Part
from oarsmith.models.cache_form import CacheForm
from oarsmith.models.decoder import Decoder
from oarsmith.native.arena import Arena
from oarsmith.native.lower import lower
from oarsmith.native.program import Program
from oarsmith.native.step import Step


class Sequences:
    """Token sequences in a step's cache, with the logits after every token that came.

    ``packed``: the program, where it is not made of the model here.
    """

    def __init__(
        self,
        model: Decoder,
        precision: str = "fp32",
        *,
        threads: int = 2,
        num_pages: int = 32,
        prompt: int = 1,
        page_size: int = 16,
        form: CacheForm | None = None,
        packed: tuple[Program, Arena] | None = None,
    ) -> None:
        program, arena = lower(model, precision) if packed is None else packed
        self.step = Step(
            program,
            arena,
            threads=threads,
            num_pages=num_pages,
            page_size=page_size,
            num_sequences=8,
            form=form,
        )
        self.prompt, self.page_size = prompt, page_size
        self.vocab_size = program.facts.vocab_size
        self.free = list(range(num_pages))[::-1]
        self.pages: dict[str, list[int]] = {}
        self.used: dict[str, int] = {}
        self.rows: dict[str, int] = {}

    def bring(self, **ids: Sequence[int]) -> dict[str, Tensor]:
        """One step with these tokens of the sequences."""
        parts = []
        for name, own in ids.items():
            start, pages = self.used.get(name, 0), self.pages.setdefault(name, [])
            while len(pages) * self.page_size < start + len(own):
                pages.append(self.free.pop())
            row = self.rows.setdefault(name, len(self.rows))
            parts.append(Part(list(own), start, row, pages, self.prompt))
            self.used[name] = start + len(own)
        count = sum(len(own) for own in ids.values())
        self.step.run(parts)
        out = torch.full((count, self.vocab_size), torch.nan)
        self.step.logits(range(count), out.data_ptr())
        return dict(zip(ids, out.split([len(own) for own in ids.values()]), strict=True))
