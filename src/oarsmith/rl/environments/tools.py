"""Tools: Python functions that a model calls by writing a call the way its family does."""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from oarsmith.errors import ConfigError
from oarsmith.rl.environments.environment import Message, Turn
from oarsmith.rl.environments.hints import schema_of
from oarsmith.rl.rewards.locate import find_function
from oarsmith.rl.rewards.verifiers.schema import Schema
from oarsmith.text import Tokenizer
from oarsmith.text.tool_parsing import ToolCall, find_tool_format

_CUT = "\n... (cut)"


class Tool:
    """A function with the schema of its hints.

    Args:
        function: returns text, or what is told as JSON.
        timeout: seconds that a call may take; one that takes longer is left behind on its thread.

    Raises:
        ConfigError: it is async, or its parameters have no hints; see `schema_of`.
    """

    def __init__(self, function: Callable[..., Any], *, timeout: float = 30.0) -> None:
        if inspect.iscoroutinefunction(function):
            raise ConfigError(f"the tool '{function.__name__}' is async", fix="write it as a plain function")
        self.schema = schema_of(function)
        self.name = function.__name__
        self._function, self._timeout = function, timeout
        self._parameters = Schema(self.schema["function"]["parameters"])

    def call(self, arguments: Mapping[str, Any]) -> tuple[str, bool]:
        """What the model is told, and whether that is an error. A tool's error is the model's to read."""
        if not self._parameters.fits(dict(arguments)):
            expected = json.dumps(self.schema["function"]["parameters"], ensure_ascii=False)
            return f"error: the arguments do not fit {self.name}: expected {expected}", True
        found: list[tuple[str, bool]] = []

        def work() -> None:
            with _ToldTo(found):
                found.append((_shown(self._function(**arguments)), False))

        thread = threading.Thread(target=work, name=f"tool {self.name}", daemon=True)
        thread.start()
        thread.join(self._timeout)
        return found[0] if found else (f"error: {self.name} took longer than {self._timeout:g} s", True)


class _ToldTo:
    """An error within it is told to the model."""

    def __init__(self, found: list[tuple[str, bool]]) -> None:
        self._found = found

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is not None:
            self._found.append((f"error: {type(error).__name__}: {error}", True))
        return True


def find_tools(names: Sequence[str], *, timeout: float = 30.0) -> list[Tool]:
    """Tools by ``file.py:function`` or ``package.module:function``.

    Raises:
        ConfigError: there is none of that name, or two have the same.
    """
    tools = [Tool(find_function(name), timeout=timeout) for name in names]
    seen = [tool.name for tool in tools]
    twice = {name for name in seen if seen.count(name) > 1}
    if twice:
        raise ConfigError(f"two tools have the name '{min(twice)}'", where="tools", fix="rename one of the functions")
    return tools


class ToolEnvironment:
    """Calls what the model calls and tells it the results; the conversation is over when it calls nothing.

    Args:
        tokenizer: of the model; says how its family writes calls.
        max_characters: of a result; more is cut, and says so.

    Attributes:
        num_calls, num_errors: so far, of this conversation.

    Raises:
        ConfigError: the tokenizer has no chat template.
    """

    def __init__(self, tools: Sequence[Tool], tokenizer: Tokenizer, *, max_characters: int = 4000) -> None:
        form = find_tool_format(tokenizer)
        if form is None:
            what = "the model has no chat template, and tools are told to a model by one"
            raise ConfigError(what, where="tools", fix="choose one with chat_template")
        self._tools, self._format = {tool.name: tool for tool in tools}, form
        self._max_characters = max_characters
        self.num_calls = self.num_errors = 0

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """Of all tools, for the chat template."""
        return [tool.schema for tool in self._tools.values()]

    def reset(self, row: Mapping[str, object]) -> list[Message] | None:
        self.num_calls = self.num_errors = 0
        return None

    def step(self, completion: str) -> Turn:
        _, calls = self._format.parse(completion, [schema["function"] for schema in self.schemas])
        if not calls:
            return Turn(done=True)
        messages, made = [], []
        for call in calls:
            call_id = f"call{self.num_calls:05d}"  # nine letters and digits, as Mistral's templates want
            told, failed = self._call(call)
            self.num_calls += 1
            self.num_errors += failed
            if len(told) > self._max_characters:
                told = told[: self._max_characters] + _CUT
            function = {"name": call.name, "arguments": json.loads(call.arguments)}
            made.append({"id": call_id, "type": "function", "function": function})
            messages.append({"role": "tool", "content": told, "name": call.name, "tool_call_id": call_id})
        return Turn(messages=tuple(messages), calls=tuple(made))

    def _call(self, call: ToolCall) -> tuple[str, bool]:
        tool = self._tools.get(call.name)
        if tool is None:
            return f"error: there is no tool '{call.name}'; there are {', '.join(self._tools) or 'none'}", True
        return tool.call(json.loads(call.arguments))


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
