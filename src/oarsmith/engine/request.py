"""One prompt on its way to an answer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal

import torch

from oarsmith.engine.reader import TextReader

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
        text: without special tokens, the stop token and the stop text; "" where the engine has no tokenizer.
        ids: every token generated, a stop token included.
        prompt_ids: what the model was given.
        finish_reason: "stop": a stop token or stop text; "length": max_new_tokens, or the context is full.
    """

    text: str
    ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    finish_reason: FinishReason

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens generated."""
        return len(self.ids)


def request_generator(seed: int, index: int) -> torch.Generator:
    """The source of randomness of request ``index``: one number a token, whatever else is in the batch."""
    digest = hashlib.blake2b(f"generate {seed} {index}".encode(), digest_size=8).digest()
    # manual_seed takes 64 bits; the top one is left out because it takes them signed.
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(eq=False)
class Request:
    """State of one prompt.

    Args:
        prompt: its token ids.
        limit: most tokens to generate.
        stop_ids: tokens that end the answer.
        generator: where its random numbers come from.
        reader: makes its text token by token; None where nobody looks at the text before the end.
    """

    prompt: list[int]
    limit: int
    stop_ids: frozenset[int]
    generator: torch.Generator
    reader: TextReader | None
    ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def room(self) -> int:
        """Tokens the cache must hold for it: the last one generated is never fed back."""
        return len(self.prompt) + self.limit - 1

    @property
    def unread(self) -> list[int]:
        """Tokens the model has not seen yet, before the first step and after it."""
        return self.ids[-1:] or self.prompt

    @property
    def text_ids(self) -> list[int]:
        """The generated ids without the stop token."""
        return self.ids[:-1] if self.ids and self.ids[-1] in self.stop_ids else self.ids

    def accept(self, token: int) -> None:
        """Take the next token of the answer; sets ``finish_reason`` if it is the last."""
        assert self.finish_reason is None, self.finish_reason
        self.ids.append(token)
        if token in self.stop_ids:
            self.finish_reason = "stop"
        elif self.reader is not None:
            self.reader.push(token)
        if self.finish_reason is None and len(self.ids) >= self.limit:
            self.finish_reason = "length"
        if self.reader is not None:
            if self.finish_reason is not None:
                self.reader.finish()
            if self.reader.stopped:
                self.finish_reason = "stop"
