"""Functions that a model may call: how they are asked for, and what its answers call."""

from __future__ import annotations

import secrets
from typing import Any

from oarsmith.serve.errors import invalid
from oarsmith.serve.openai.schemas import ChatRequest, NamedTool
from oarsmith.text import Tokenizer
from oarsmith.text.tool_parsing import PLAIN, ToolCall, ToolFormat, ToolStream, find_tool_format, forced_schema


class ToolUse:
    """What a request says of tools.

    Attributes:
        schemas: for the chat template; empty: there are none.
        constraint: what of the sampling makes the answer a call, where one is demanded, and keeps it readable.
    """

    def __init__(
        self,
        schemas: list[dict[str, Any]],
        constraint: dict[str, Any],
        format: ToolFormat | None,
        most: int | None = None,
    ) -> None:
        self.schemas = schemas
        self._most = most
        self.constraint = constraint
        self._format = format
        self._functions = [schema["function"] for schema in schemas]

    @staticmethod
    def of(body: ChatRequest, tokenizer: Tokenizer) -> ToolUse:
        """From a request.

        Raises:
            ApiError: a choice among tools that are not there, or one beside another constraint.
        """
        if not body.tools or body.tool_choice == "none":
            if body.tool_choice not in (None, "none", "auto"):
                raise invalid("tool_choice demands a call, but there are no tools", "tool_choice")
            return ToolUse([], {}, None)
        schemas = [tool.model_dump(exclude_none=True) for tool in body.tools]
        functions = [schema["function"] for schema in schemas]
        name = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
        if name is not None and name not in [function["name"] for function in functions]:
            raise invalid(f"tool_choice names {name[:100]!r}, which is none of the tools", "tool_choice")
        if body.tool_choice in (None, "auto"):
            form = find_tool_format(tokenizer)
            shown = {"skip_special_tokens": False} if form is not None and form.needs_special(tokenizer) else {}
            return ToolUse(schemas, shown, form, 1 if body.parallel_tool_calls is False else None)
        if body.response_format is not None and body.response_format.type != "text":
            raise invalid("tool_choice demands a call and response_format something else", "response_format")
        return ToolUse(schemas, {"json_schema": forced_schema(functions, name)}, PLAIN)

    def read(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """What an answer says, and its calls as OpenAI has them."""
        if self._format is None:
            return text, []
        said, calls = self._format.parse(text, self._functions)
        return said, [_as_object(call) for call in calls[: self._most]]

    def stream(self) -> ToolReader:
        """Reads one answer as it comes."""
        return ToolReader(None if self._format is None else self._format.stream(self._functions), self._most)


class ToolReader:
    """An answer's text to deltas of its message.

    Attributes:
        num_calls: so far.
    """

    def __init__(self, stream: ToolStream | None, most: int | None) -> None:
        self._stream = stream
        self._most = most
        self.num_calls = 0

    def feed(self, text: str) -> list[dict[str, Any]]:
        """Deltas after some more text."""
        if self._stream is None:
            return [{"content": text}] if text else []
        return self._deltas(self._stream.feed(text))

    def finish(self) -> list[dict[str, Any]]:
        """What is left at the end."""
        return [] if self._stream is None else self._deltas(self._stream.finish())

    def _deltas(self, parts: list[str | ToolCall]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, str):
                found.append({"content": part})
            elif self.num_calls != self._most:
                found.append({"tool_calls": [{"index": self.num_calls, **_as_object(part)}]})
                self.num_calls += 1
        return found


def _as_object(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call{secrets.token_hex(3)}"[:9], "type": "function", "function": function}
