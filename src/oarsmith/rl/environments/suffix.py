"""Token in, token out: ids of what an environment appends, and of nothing else.

What the model wrote is never encoded again. The template renders the conversation with and without the new turn, the
model's text standing for itself as a word; what lies behind that word, less what the model wrote of it itself (the
token that ends its turn), is encoded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from oarsmith.errors import DataError
from oarsmith.rl.environments.environment import EpisodeError, Message, Turn
from oarsmith.text import Tokenizer
from oarsmith.text.rendered import RenderedChat

_WORD = "placeholderanswer"


class SuffixEncoder:
    """Renders turns with one tokenizer's template.

    Args:
        tools: schemas that the template is given.
        variables: what else it reads.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._tools, self._variables = list(tools) if tools else None, dict(variables or {})
        ids = tokenizer.stop_ids
        self._stops = {index: text for index in ids if (text := tokenizer.decode([index]))}

    def prompt(self, messages: Sequence[Message]) -> str:
        """The conversation up to where the model speaks.

        Raises:
            DataError: the template does not take it.
        """
        return self.tokenizer.apply_chat_template(messages, self._tools, True, **self._variables)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Its ids; as `prompt`."""
        return self.tokenizer.encode(self.prompt(messages), False)

    def turn_ids(self, messages: Sequence[Message], turn: Turn, written: Sequence[int]) -> list[int]:
        """Ids that follow ``written``.

        Args:
            messages: what came before the text that the model wrote last.
            written: ids of that text, with the token that ended it if there was one.

        Raises:
            EpisodeError: the template does not show the turn, or renders it so that what is behind cannot be told.
        """
        if turn.text:
            return self.encode_after(turn.text)
        last = written[-1] if written else None
        said: Message = {"role": "assistant", "content": _WORD}
        # Some templates take one call at a time, and a model may write two: then its text stands for itself.
        answers = [said]
        if turn.calls:
            answers.insert(0, {**said, "tool_calls": [dict(call) for call in turn.calls]})
        for answer in answers[:-1]:
            with contextlib.suppress(EpisodeError):
                return self.encode_after(self._behind(messages, answer, turn.messages, last))
        return self.encode_after(self._behind(messages, answers[-1], turn.messages, last))

    def _behind(self, messages: Sequence[Message], answer: Message, follow: Sequence[Message], last: int | None) -> str:
        """What the template writes behind the answer, less the end of turn that is there."""
        try:
            without = self.tokenizer.apply_chat_template([*messages, answer], self._tools, False, **self._variables)
            whole = self.tokenizer.apply_chat_template(
                [*messages, answer, *follow], self._tools, True, **self._variables
            )
        except DataError as error:
            what = f"the chat template refuses the turn: {error.what}"
            raise EpisodeError(what, fix="append text in place of messages, or use another chat_template") from error
        common = _common(without, whole)
        end = self._end_of_answer(without[:common], answer) or self._end_of_word(whole)
        if end is None:
            what = "the chat template shows an answer differently once something follows it"
            raise EpisodeError(what, fix="append text in place of messages, or use another chat_template")
        begins, ends = end
        for message in follow:
            if str(message.get("content", "")).strip() not in whole[begins:]:
                what = f"the chat template leaves out a message of role '{message.get('role')}'"
                raise EpisodeError(what, fix="append text in place of messages, or use another chat_template")
        return _cut(whole, ends if last in self._stops else begins)

    def _end_of_answer(self, shared: str, answer: Message) -> tuple[int, int] | None:
        """Where the last end of turn begins and ends in what both renderings share; of a template without such a token
        both are where the answer's text ends. None: it is not shared."""
        found = [(shared.rfind(text), text) for text in self._stops.values()]
        at, text = max(found, default=(-1, ""))
        word, calls = shared.rfind(_WORD), answer.get("tool_calls", ())
        said = max(word, *(shared.rfind(call["function"]["name"]) for call in calls), -1)
        if at > said >= 0:
            return at, at + len(text)
        if word >= 0 and not calls:
            return word + len(_WORD), word + len(_WORD)
        return None

    def _end_of_word(self, whole: str) -> tuple[int, int] | None:
        """The same where the last answer is shown in another way than earlier ones (Qwen3: with empty thoughts)."""
        word = whole.rfind(_WORD)
        if word < 0:
            return None
        behind = word + len(_WORD)
        skipped = behind + len(whole[behind:]) - len(whole[behind:].lstrip())
        texts = [text for text in self._stops.values() if whole.startswith(text, skipped)]
        return (skipped, skipped + len(max(texts, key=len))) if texts else (behind, behind)

    def encode_after(self, text: str) -> list[int]:
        """Ids of a text that others stand before: without a space that a tokenizer would put in front.

        Raises:
            EpisodeError: the tokenizer cannot encode it by itself.
        """
        if not text:
            return []
        ids = self.tokenizer.encode(text, False)
        if isinstance(text, RenderedChat) or self.tokenizer.decode(ids) == text:
            return ids
        for anchor in ("\n", "a"):
            before = self.tokenizer.encode(anchor, False)
            joined = self.tokenizer.encode(anchor + text, False)
            if (
                joined[: len(before)] == before
                and self.tokenizer.decode(joined) == self.tokenizer.decode(before) + text
            ):
                return joined[len(before) :]
        if self.tokenizer.decode(ids).strip() == text.strip():
            return ids
        raise EpisodeError(f"the tokenizer changes what is appended: {text[:60]!r}")


def _common(first: str, second: str) -> int:
    size = min(len(first), len(second))
    return next((at for at in range(size) if first[at] != second[at]), size)


def _cut(text: str, start: int) -> str:
    """The text from a character on, with the parts that it is encoded by."""
    if not isinstance(text, RenderedChat):
        return text[start:]
    parts, at = [], 0
    for part in text.parts:
        end = at + len(part.text)
        if end > start:
            skip = max(0, start - at)
            parts.append(type(part)(part.text[skip:], is_control=part.is_control and skip == 0))
        at = end
    return RenderedChat(parts)
