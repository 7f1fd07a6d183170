"""One conversation of a model with an environment, in token ids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from oarsmith.rl.environments.environment import Environment, EpisodeError, Message, Turn
from oarsmith.rl.environments.suffix import SuffixEncoder
from oarsmith.rl.rewards.locate import line_of

Over = Literal["done", "turns", "length", "truncated"]


@dataclass(frozen=True)
class EpisodeLimits:
    """Attributes:
    max_turns: texts that the model may write.
    max_tokens: of everything behind the prompt, what is appended included.
    max_appended: tokens of one turn of the environment; a longer one is cut where it is text of a message.
    """

    max_turns: int = 8
    max_tokens: int = 4096
    max_appended: int = 1024


class Episode:
    """Drives an environment: begin, then give what the model wrote until nothing is to be appended.

    Attributes:
        ids, own: everything behind the prompt so far, and which of it the model wrote.
        reward: the sum of the environment's rewards; None: it gave none.
        over: why it ended: the environment was done, or a limit of turns or length, or an answer that was cut.
        num_turns: texts of the model.
    """

    def __init__(self, environment: Environment, encoder: SuffixEncoder, limits: EpisodeLimits) -> None:
        self._environment, self._encoder, self._limits = environment, encoder, limits
        # The first ones are enough: what a turn adds does not depend on the turns between.
        self._messages: list[Message] = []
        self.ids: list[int] = []
        self.own: list[bool] = []
        self.reward: float | None = None
        self.over: Over | None = None
        self.num_turns = 0

    def begin(self, row: Mapping[str, object], messages: Sequence[Message]) -> list[int]:
        """Ids of the prompt.

        Args:
            messages: the row's own, for environments that bring none.

        Raises:
            OarsmithError: the environment failed, or the template refuses its messages.
        """
        try:
            own = self._environment.reset(row)
        except Exception as error:
            raise _failed("reset", error) from error
        self._messages = [dict(message) for message in (messages if own is None else own)]
        return self._encoder.prompt_ids(self._messages)

    @property
    def room(self) -> int:
        """Tokens that are left for the model."""
        return max(0, self._limits.max_tokens - len(self.ids))

    def after(self, written: Sequence[int], *, truncated: bool = False) -> list[int] | None:
        """What follows the ids that the model wrote; None: the conversation is over.

        Args:
            written: with the token that ended them.
            truncated: a limit of length ended them; the environment is not asked.

        Raises:
            EpisodeError: the environment failed, or its turn cannot be appended.
        """
        assert self.over is None, self.over
        self.ids += written
        self.own += [True] * len(written)
        self.num_turns += 1
        if truncated:
            self.over = "truncated"
            return None
        tokenizer = self._encoder.tokenizer
        spoken = written[:-1] if written and written[-1] in tokenizer.stop_ids else written
        # Calls of some families are made of special tokens.
        text = tokenizer.decode(list(spoken))
        turn = self._step(text)
        if turn.done:
            self.over = "done"
            return None
        if self.num_turns >= self._limits.max_turns:
            self.over = "turns"
            return None
        appended = self._appended(turn, written)
        if len(appended) >= self.room:
            self.over = "length"
            return None
        self.ids += appended
        self.own += [False] * len(appended)
        return appended

    def _step(self, text: str) -> Turn:
        try:
            turn = self._environment.step(text)
        except EpisodeError:
            raise
        except Exception as error:
            raise _failed("step", error) from error
        if not isinstance(turn, Turn):
            raise EpisodeError(f"step returned a {type(turn).__name__}", fix="return a Turn")
        if turn.reward is not None:
            if isinstance(turn.reward, bool) or not math.isfinite(turn.reward):
                raise EpisodeError(f"the environment's reward is {turn.reward}", fix="give a finite number or None")
            self.reward = (self.reward or 0.0) + float(turn.reward)
        return turn

    def _appended(self, turn: Turn, written: Sequence[int]) -> list[int]:
        appended = self._encoder.turn_ids(self._messages, turn, written)
        most = self._limits.max_appended
        while len(appended) > most:
            turn = _shorter(turn, len(appended), most)
            appended = self._encoder.turn_ids(self._messages, turn, written)
        return appended


def _shorter(turn: Turn, size: int, most: int) -> Turn:
    """The turn with its longest text cut in proportion.

    Raises:
        EpisodeError: what is left is the template's own.
    """
    if turn.text:
        return Turn(text=turn.text[: int(len(turn.text) * most / size * 0.95)] or " ", reward=turn.reward)
    longest = max(range(len(turn.messages)), key=lambda at: len(str(turn.messages[at].get("content", ""))))
    content = str(turn.messages[longest].get("content", ""))
    if not content:
        raise EpisodeError(f"the turn has {size} tokens without any text, more than {most}", fix="raise max_appended")
    kept = content[: int(len(content) * most / size * 0.95)]
    messages = list(turn.messages)
    messages[longest] = {**messages[longest], "content": kept}
    return Turn(messages=tuple(messages), reward=turn.reward, calls=turn.calls)


def _failed(what: str, error: Exception) -> EpisodeError:
    return EpisodeError(f"the environment failed in {what}: {type(error).__name__}: {error}", where=line_of(error))
