"""``length``, ``overlong`` and ``repetition``: what an answer looks like, whatever it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from oarsmith.errors import ConfigError
from oarsmith.rl.completion import Completion
from oarsmith.rl.rewards.options import RewardOptions
from oarsmith.rl.rewards.values import Value
from oarsmith.rl.rewards.verifiers.verifier import Verifier

Unit = Literal["tokens", "words", "characters"]


def _own_tokens(one: Completion) -> int:
    """How many tokens the model wrote."""
    return sum(one.own) if one.own else len(one.token_ids)


def size_of(one: Completion, unit: Unit) -> int:
    """The length of an answer; tokens are those that the model wrote."""
    return {"tokens": _own_tokens, "words": lambda o: len(o.text.split()), "characters": lambda o: len(o.text)}[unit](
        one
    )


class LengthOptions(RewardOptions):
    """Options of ``length``."""

    at_least: int = Field(0, ge=0, description="Shorter answers lose `penalty` in proportion to what they lack.")
    at_most: int | None = Field(None, ge=1, description="Longer ones lose it in proportion to what they have too much.")
    unit: Unit = Field("tokens", description="tokens (that the model wrote), words or characters.")
    penalty: float = Field(1.0, ge=0, description="The most that is lost: empty, or twice as long as allowed.")


class LengthReward(Verifier):
    """0 within bounds, down to ``-penalty`` outside.

    Raises:
        ConfigError: no bounds, or the upper one is lower.
    """

    def __init__(self, options: LengthOptions) -> None:
        super().__init__(options.name or "length")
        if not options.at_least and options.at_most is None:
            raise ConfigError("the reward 'length' has no bounds", fix="give at_least or at_most")
        if options.at_most is not None and options.at_most < options.at_least:
            raise ConfigError(f"at_most {options.at_most} is less than at_least {options.at_least}", where="length")
        self._options = options

    def check(self, one: Completion, where: str) -> Value:
        options, size = self._options, size_of(one, self._options.unit)
        if size < options.at_least:
            return -options.penalty * (options.at_least - size) / options.at_least
        if options.at_most is not None and size > options.at_most:
            return -options.penalty * min(1.0, (size - options.at_most) / options.at_most)
        return 0.0


@dataclass(frozen=True, kw_only=True)
class Overlong:
    """Soft punishment of long answers (DAPO, Yu et al. 2025, equation 13): nothing up to ``longest - buffer`` tokens,
    then along a line to ``-penalty`` at ``longest``."""

    longest: int
    buffer: int
    penalty: float

    def of(self, length: int) -> float:
        """What is added to the reward of an answer of so many tokens."""
        over = length - (self.longest - self.buffer)
        return -self.penalty * min(max(over / self.buffer, 0.0), 1.0)


class OverlongOptions(RewardOptions):
    """Options of ``overlong``."""

    max_length: int = Field(ge=1, description="Tokens after which an answer is cut (max_new_tokens).")
    buffer: int = Field(256, ge=1, description="So many tokens before it the penalty begins to grow.")
    penalty: float = Field(1.0, ge=0, description="Penalty of an answer that is cut.")


class OverlongReward(Verifier):
    """See `Overlong`.

    Raises:
        ConfigError: the buffer is longer than the answer may be.
    """

    def __init__(self, options: OverlongOptions) -> None:
        super().__init__(options.name or "overlong")
        if options.buffer > options.max_length:
            what = f"buffer {options.buffer} is more than max_length {options.max_length}"
            raise ConfigError(what, where="reward 'overlong'", fix="give a smaller buffer")
        self._overlong = Overlong(longest=options.max_length, buffer=options.buffer, penalty=options.penalty)

    def check(self, one: Completion, where: str) -> Value:
        return self._overlong.of(_own_tokens(one))


class RepetitionOptions(RewardOptions):
    """Options of ``repetition``."""

    ngram: int = Field(4, ge=1, description="Length of the runs of words (or tokens) that are counted.")
    unit: Literal["tokens", "words"] = Field("words", description="words of the text, or tokens that the model wrote.")
    penalty: float = Field(1.0, ge=0, description="Penalty of an answer in which every run is a repeated one.")


class RepetitionReward(Verifier):
    """``-penalty`` times the share of n-grams that are copies of earlier ones (Yeo et al. 2025, appendix C)."""

    def __init__(self, options: RepetitionOptions) -> None:
        super().__init__(options.name or "repetition")
        self._options = options

    def check(self, one: Completion, where: str) -> Value:
        options = self._options
        items: list[str] | list[int] = one.text.split()
        if options.unit == "tokens":
            own = one.own or (True,) * len(one.token_ids)
            items = [token for token, mine in zip(one.token_ids, own, strict=True) if mine]
        grams = [tuple(items[at : at + options.ngram]) for at in range(len(items) - options.ngram + 1)]
        return -options.penalty * (1 - len(set(grams)) / len(grams)) if grams else 0.0
