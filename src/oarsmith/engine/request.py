"""One prompt on its way to an answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from oarsmith.engine.choice import Choice
from oarsmith.engine.draws import Draws
from oarsmith.engine.pace import Pace
from oarsmith.engine.pages import PageTable
from oarsmith.engine.reader import TextReader
from oarsmith.engine.state import SamplingState
from oarsmith.errors import OarsmithError
from oarsmith.models.virtual import virtual_ids

if TYPE_CHECKING:
    from oarsmith.engine.beams import Beams

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
        text: without special tokens, the stop token and the stop text; "" where the engine has no tokenizer.
        ids: every token generated, a stop token included.
        prompt_ids: what the model was given.
        finish_reason: "stop": a stop token or stop text; "length": max_new_tokens, or the context is full.
        logprobs: of every token generated, where the sampling asks for them.
        prompt_logprobs: the same for the prompt from its second token on.
        others: further answers to the same prompt, where the sampling asks for more than one; of ``best_of`` answers
            and of beams this is the best and they follow in order.
        score: of a beam search: the answer's log-probability divided by its length to the power of the penalty.
    """

    text: str
    ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[Choice, ...] | None = None
    prompt_logprobs: tuple[Choice, ...] | None = None
    others: tuple[Completion, ...] = ()
    score: float | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens generated."""
        return len(self.ids)


def request_draws(seed: int, index: int, answer: int = 0) -> Draws:
    """The source of randomness of an answer to prompt ``index``: one number a token, whatever else is in the batch."""
    return Draws(f"generate {seed} {index}" + (f" {answer}" if answer else ""))


@dataclass(eq=False, kw_only=True)
class Request:
    """One answer on its way.

    Args:
        id: names it in errors.
        prompt: its token ids.
        limit: most tokens to generate.
        stop_ids: tokens that end the answer.
        state: what the choice of its tokens depends on.
        reader: makes its text token by token; None where nobody looks at the text before the end.
        priority: those with a higher one come first.
        arrival: its place among those with the same priority.
        prompt_logprobs: how many of the likeliest tokens are wanted beside each token of the prompt; None: nothing.
        siblings: further answers to the same prompt, which go on from its pages once the prompt is read.
        pace: how many of its tokens are guessed at a time; None: none are.
        beams: the search that it is a seat of.
        adapter: the one it goes through.
        salt: what beside its tokens decides about its keys.
        num_virtual: tokens that stand before the prompt and have no word.

    Attributes:
        tokens: virtual ones, prompt and answer.
        choices: the tokens of the answer with what was asked about them.
        prompt_choices: the same for the prompt, from its second token on.
        error: why there will be no answer.
        score: what a search ranks the answer by.
        num_computed, prompt_size, table, row, waiting: the scheduler's: tokens that are in the cache, how many were
            there when reading began, the pages, the row of the cache, whether it waits.
        num_followed: tokens that are in the cache of a model which guesses.
        num_told: tokens of the answer that somebody was told of.
    """

    id: str
    prompt: list[int]
    limit: int
    stop_ids: frozenset[int]
    state: SamplingState
    reader: TextReader | None = None
    priority: int = 0
    arrival: int = 0
    prompt_logprobs: int | None = None
    siblings: list[Request] = field(default_factory=list)
    pace: Pace | None = None
    beams: Beams | None = None
    adapter: str | None = None
    salt: bytes = b""
    num_virtual: int = 0
    tokens: list[int] = field(init=False)
    choices: list[Choice] = field(default_factory=list)
    prompt_choices: list[Choice] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: OarsmithError | None = None
    score: float | None = None
    num_computed: int = 0
    num_followed: int = 0
    prompt_size: int = 0
    table: PageTable | None = None
    row: int | None = None
    waiting: bool = False
    num_told: int = 0

    def __post_init__(self) -> None:
        self.tokens = [*virtual_ids(self.num_virtual), *self.prompt]

    @property
    def num_given(self) -> int:
        """Tokens before the answer."""
        return self.num_virtual + len(self.prompt)

    @property
    def ids(self) -> list[int]:
        """The tokens generated."""
        return self.tokens[self.num_given :]

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_given

    @property
    def done(self) -> bool:
        """Whether it is finished or failed."""
        if self.beams is not None:
            return self.beams.over
        return self.finish_reason is not None or self.error is not None

    @property
    def seats(self) -> list[Request]:
        """All that come and go together."""
        return [self] if self.beams is None else self.beams.seats

    @property
    def room(self) -> int:
        """Tokens the cache must hold for it: the last one generated is never fed back."""
        return self.num_given + self.limit - 1

    @property
    def num_left(self) -> int:
        """Tokens that are known and not in the cache."""
        return len(self.tokens) - self.num_computed

    @property
    def num_guesses(self) -> int:
        """How many tokens are to be guessed after the last one, which is to be computed next."""
        if self.pace is None or self.num_generated == 0 or self.num_left != 1:
            return 0
        # One more is always taken.
        return min(self.pace.size, self.limit - self.num_generated - 1)

    @property
    def num_to_read(self) -> int:
        """Tokens that are to be computed before the next one is chosen in the usual way.

        Where tokens are guessed, the last one of an answer that is read again is kept for a step with guesses: they do
        not depend on when a request lost its pages. The last ones of a search are kept for one step.
        """
        if self.num_shared is not None:
            return self.num_shared - self.num_computed
        kept = self.pace is not None or self.beams is not None
        again = kept and self.num_generated > 0 and self.num_left > 1
        return self.num_left - again

    @property
    def num_shared(self) -> int | None:
        """Tokens that it is to read for all of its search; None: it reads for itself."""
        return None if self.beams is None else self.beams.num_shared

    @property
    def wants_all_logits(self) -> bool:
        """Whether something is still to be said about each token of the prompt."""
        return self.prompt_logprobs is not None and len(self.prompt_choices) < len(self.prompt) - 1

    @property
    def text_ids(self) -> list[int]:
        """The generated ids without the stop token."""
        ids = self.ids
        return ids[:-1] if ids and ids[-1] in self.stop_ids else ids

    def order(self) -> tuple[int, int]:
        """Who comes first: the smaller one."""
        return -self.priority, self.arrival

    def accept(self, choice: Choice) -> None:
        """Take the next token of the answer; sets ``finish_reason`` if it is the last, ``error`` if it cannot be."""
        assert not self.done, (self.finish_reason, self.error)
        token = choice.token
        try:
            self.state.accept(token)
        except OarsmithError as error:
            self.error = error
            return
        self.tokens.append(token)
        self.choices.append(choice)
        if token in self.stop_ids:
            self.finish_reason = "stop"
        elif self.reader is not None:
            self.reader.push(token)
        if self.finish_reason is None and self.num_generated >= self.limit:
            self.finish_reason = "length"
        if self.reader is not None:
            if self.finish_reason is not None:
                self.reader.finish()
            if self.reader.stopped:
                self.finish_reason = "stop"
