"""How the tokens of an answer are chosen, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from oarsmith.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Applied to the logits in transformers' order: repetition penalty, temperature, top-k, top-p.

    Args:
        max_new_tokens: longest answer in tokens; the model's context may end it earlier.
        temperature: logits are divided by it; 0 takes the likeliest token (top-k and top-p cannot change that one).
        top_k: draw only among the k likeliest tokens; 0: all.
        top_p: draw only among the likeliest tokens whose probabilities, after top-k, add up to this (at least one).
        repetition_penalty: logits of tokens that occur in prompt or answer are divided by it where positive and
            multiplied where negative (Keskar et al. 2019).
        stop: texts that end an answer; they are not part of it.
        stop_ids: token ids that end an answer, besides the tokenizer's.
        seed: the draws of request number i of a call follow from (seed, i) alone; None: a new one for each call.
        ignore_eos: do not end at the tokenizer's end-of-sequence and end-of-turn tokens.

    Raises:
        ConfigError: a value outside its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        # A bare string would otherwise be taken for one stop text a character.
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "0 (greedy) or above"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            (
                "repetition_penalty",
                math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
                "above 0 (1: none)",
            ),
            ("stop", all(self.stop), "texts that are not empty"),
        )
        for name, holds, limit in checks:
            if not holds:
                raise ConfigError(f"{name} is {vars(self)[name]!r}", where=name, fix=f"{name} must be {limit}")
