"""PaddleNLP's `chat_template.json`: a system text, a (user part, bot part) pair and a query, each in jinja."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oarsmith.errors import CheckpointError, DataError
from oarsmith.text.sandbox import Rendering, compile_template, run_template

_KEYS = ("system", "conversation", "query")
# `{{system | 'text'}}` is PaddleNLP's way to write a default value; jinja2 spells it `default('text')`.
_DEFAULT_VALUE = re.compile(r"""(\{\{[^{}|]*)\|\s*('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(\s*\}\})""")


@dataclass(frozen=True)
class PaddleBody:
    """The three parts. `conversation` is (user part without loss, bot part with loss); absent parts are None."""

    system: str | None
    conversation: tuple[str, str] | None
    query: str | None

    @classmethod
    def parse(cls, content: Mapping[str, Any], origin: str) -> PaddleBody:
        """Check the object's shape and that each part compiles."""
        unknown = sorted(set(content) - set(_KEYS))
        if unknown or not isinstance(content.get("query", ""), (str, type(None))):
            raise CheckpointError(
                f"not a chat template: unexpected {', '.join(unknown) or 'type of query'}",
                where=origin,
                fix="its keys are system (text), conversation (two texts) and query (text)",
            )
        pair = content.get("conversation")
        if pair is not None and not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        ):
            raise CheckpointError(
                "'conversation' must hold exactly two texts: the user's part and the bot's part", where=origin
            )
        system = content.get("system")
        if not isinstance(system, (str, type(None))):
            raise CheckpointError(f"'system' must be a text, not {type(system).__name__}", where=origin)
        body = cls(system, (pair[0], pair[1]) if pair is not None else None, content.get("query"))
        for part in body.sources:
            _compile(part[1])
        return body

    @property
    def sources(self) -> tuple[tuple[str, str], ...]:
        """The parts that are present, by name."""
        user, bot = self.conversation or (None, None)
        parts = {"system": self.system, "conversation.user": user, "conversation.bot": bot, "query": self.query}
        return tuple((name, text) for name, text in parts.items() if text is not None)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> Rendering:
        """Render as PaddleNLP does; a last user message uses `query` at inference, the user part in training.

        `is_training` (default False) and every other variable reach the parts, with `index`, `length`, `is_first` and
        `is_last` of the turn. The spans are those of the bot parts.
        """
        if tools:
            raise DataError("a PaddleNLP chat_template.json cannot describe tools", fix="use a jinja chat template")
        system, turns = _turns(messages)
        context: dict[str, Any] = {"is_training": False, **variables}
        if system is not None:
            context["system"] = system
        context["length"] = len(turns)
        text = _run(self.system, context) if self.system is not None else ""
        spans = []
        for index, (user, bot) in enumerate(turns):
            context.update(index=index, is_first=index == 0, is_last=index == len(turns) - 1)
            at_inference = add_generation_prompt and not context["is_training"]
            if bot is None and at_inference:
                text += user if self.query is None else _run(self.query, {**context, "query": user})
                continue
            user_part, bot_part = self._pair()
            text += _run(user_part, {**context, "user": user, "bot": bot})
            if bot is not None:
                answer = _run(bot_part, {**context, "user": user, "bot": bot})
                spans.append((len(text), len(text) + len(answer)))
                text += answer
        return Rendering(text, tuple(spans))

    def _pair(self) -> tuple[str, str]:
        if self.conversation is None:
            raise DataError(
                "the chat template has no 'conversation' part, so it can render one question but no earlier turns",
                fix="add 'conversation': [user part, bot part] to chat_template.json",
            )
        return self.conversation


def _turns(messages: Sequence[Mapping[str, Any]]) -> tuple[str | None, list[tuple[str, str | None]]]:
    """System text and (user, bot) pairs; the last bot may be missing."""
    system: str | None = None
    turns: list[tuple[str, str | None]] = []
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        open_turn = bool(turns) and turns[-1][1] is None
        expected = "assistant" if open_turn else "user"
        if not isinstance(content, str):
            raise DataError(f"the content of message {index} is not a text", where=f"message {index}")
        if role == "system" and index == 0:
            system = content
        elif role != expected:
            raise DataError(
                f"a PaddleNLP chat template takes an optional system message, then user and assistant in turn; message "
                f"{index} has role '{role}' where '{expected}' is expected",
                where=f"message {index}",
            )
        elif open_turn:
            turns[-1] = (turns[-1][0], content)
        else:
            turns.append((content, None))
    return system, turns


def _compile(source: str) -> Any:
    return compile_template(_DEFAULT_VALUE.sub(r"\1| default(\2)\3", source), keep_trailing_newline=True)


def _run(source: str, variables: Mapping[str, Any]) -> str:
    return run_template(_compile(source), variables).text
