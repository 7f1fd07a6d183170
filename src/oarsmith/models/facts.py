"""What an engine must know of a model to serve it, whatever computes it. No PyTorch here."""

from __future__ import annotations

from dataclasses import dataclass

from oarsmith.models.caching import CacheRules
from oarsmith.models.spec import DecoderSpec, PrefixLM, ResetAfter


@dataclass(frozen=True)
class ModelFacts:
    """``max_positions``: the context. ``visibility``: the rule that decides who sees whom, beside causality.
    ``num_virtual``: tokens of the context that stand in front of every sequence (see ``part.py``). ``num_scores``: of a
    model that scores texts and writes none; else None."""

    vocab_size: int
    max_positions: int
    visibility: PrefixLM | ResetAfter | None
    rules: CacheRules
    num_virtual: int = 0
    num_scores: int | None = None

    @property
    def room(self) -> int:
        """Tokens of prompt and answer that the context holds."""
        return self.max_positions - self.num_virtual

    @staticmethod
    def of(spec: DecoderSpec) -> ModelFacts:
        """The facts of a decoder."""
        return ModelFacts(
            spec.vocab_size,
            spec.max_positions,
            spec.visibility,
            CacheRules.of(spec),
            spec.num_virtual,
            spec.head.num_scores,
        )
