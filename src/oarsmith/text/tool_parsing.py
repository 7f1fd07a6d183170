"""Calls of functions in an answer's text, as families of models write them.

What is no whole, valid call stays text; nothing here raises for what a model wrote.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from oarsmith.text.tokenizer import Tokenizer
from oarsmith.text.tools import readers
from oarsmith.text.tools.readers import Reader
from oarsmith.text.tools.source import Reading, Source
from oarsmith.text.tools.values import Schemas, ToolCall

__all__ = ["PLAIN", "ToolCall", "ToolFormat", "ToolStream", "find_tool_format", "forced_schema"]


@dataclass(frozen=True)
class ToolFormat:
    """How calls stand in a text.

    Attributes:
        anywhere: markers, and what reads the calls behind each.
        leading: the same for those that count at the beginning of the answer only; "": none stands there.
        dropped: texts that belong to the format and to no call.
        keeps_special: special tokens that must stay in the text for it to be read.
    """

    name: str
    anywhere: Mapping[str, Reader] = field(default_factory=dict)
    leading: Mapping[str, Reader] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    keeps_special: tuple[str, ...] = ()

    def needs_special(self, tokenizer: Tokenizer) -> bool:
        """Whether what it is read by are special tokens there, so that the text must be made with them."""
        ids = (tokenizer.backend.token_to_id(token) for token in (*self.anywhere, *self.keeps_special))
        return any(index in tokenizer.special_ids for index in ids)

    def parse(self, text: str, tools: Sequence[Mapping[str, Any]] = ()) -> tuple[str, list[ToolCall]]:
        """What is said, and what is called. Equal to what `stream` gives, put together.

        Args:
            tools: the functions (``{"name", "parameters"}``): for formats whose values do not say their kind.
        """
        stream = self.stream(tools)
        parts = [*stream.feed(text), *stream.finish()]
        said = "".join(part for part in parts if isinstance(part, str))
        return said, [part for part in parts if isinstance(part, ToolCall)]

    def stream(self, tools: Sequence[Mapping[str, Any]] = ()) -> ToolStream:
        """Reads an answer piece by piece."""
        found = {tool.get("name"): tool.get("parameters") for tool in tools}
        return ToolStream(self, {str(name): value for name, value in found.items() if isinstance(value, Mapping)})


class ToolStream:
    """Text as it comes, except what may begin a call and white space around calls; calls once they are complete."""

    def __init__(self, format: ToolFormat, schemas: Schemas) -> None:
        self._format = format
        self._schemas = schemas
        self._source = Source()
        self._found: list[str | ToolCall] = []
        firsts = {marker[:1] for marker in (*format.anywhere, *format.dropped)}
        self._plain = re.compile(rf"[^\s{re.escape(''.join(sorted(firsts)))}]*")
        self._reading = self._read()

    def feed(self, text: str) -> list[str | ToolCall]:
        """What is known after some more text."""
        self._source.text += text
        return self._advance()

    def finish(self) -> list[str | ToolCall]:
        """What is left at the end."""
        self._source.over = True
        return self._advance()

    def _advance(self) -> list[str | ToolCall]:
        next(self._reading, None)
        found, self._found = self._found, []
        return found

    def _say(self, text: str) -> None:
        if self._found and isinstance(self._found[-1], str):
            self._found[-1] += text
        elif text:
            self._found.append(text)

    def _read(self) -> Reading[None]:
        source, form = self._source, self._format
        leading, space_counts = True, True
        while True:
            source.forget()
            space = yield from source.span(readers.SPACE)
            if source.at == len(source.text):
                # `span` waits for something to follow, unless it is over.
                self._say(space if space_counts else "")
                return
            expected = {**form.anywhere, **(form.leading if leading else {})}
            marker = yield from source.one_of((*form.dropped, *expected))
            if marker in form.dropped:
                space_counts = False
                continue
            calls = None
            if marker in expected:
                behind = source.at
                calls = yield from expected[marker](source, marker, self._schemas)
                if calls is None:
                    source.at = behind
            if calls is not None:
                self._found += calls
                space_counts = False
                if leading:
                    yield from source.span(_BETWEEN)
                continue
            self._say((space if space_counts else "") + (marker or source.text[source.at]))
            source.at += not marker
            source.at = self._plain_end()
            leading, space_counts = False, True

    def _plain_end(self) -> int:
        found = self._plain.match(self._source.text, self._source.at)
        assert found is not None
        self._say(found[0])
        return found.end()


_BETWEEN = re.compile(r"[\s;]*")
_FENCE = {"```json": readers.read_json("```", explicit=True), "```tool_code": readers.read_python}
_JSON = {**_FENCE, "{": readers.read_json(explicit=True), "[": readers.read_list}

PLAIN = ToolFormat("json", leading=_JSON)
"""Of templates that name no way: an answer that is JSON of calls, or a list of calls as Python has them."""


def _marked(name: str, readings: Mapping[str, Reader], *, ends: tuple[str, ...] = (), json: bool = True) -> ToolFormat:
    """A format with markers; without one, an answer that is JSON of calls is read too."""
    return ToolFormat(name, readings, _JSON if json else {}, keeps_special=(*readings, *ends))


_LIST = readers.read_json("<|/tool_call|>", "</tool_call>")
_DEEPSEEK = dict.fromkeys(("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"), readers.read_deepseek)
_HARMONY = dict.fromkeys(("<|start|>", "<|channel|>"), readers.read_harmony)
_FUNCTION = {"<function=": readers.read_function}
_GLM = ToolFormat("glm", leading={**_JSON, "": readers.read_glm}, dropped=("<|assistant|>",))
_PLUGIN = "<|action_start|><|plugin|>"

_FORMATS: tuple[tuple[str, ToolFormat], ...] = (
    (
        "<｜tool▁calls▁begin｜>",
        _marked(
            "deepseek",
            _DEEPSEEK,
            ends=("<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
        ),
    ),
    ("[TOOL_CALLS]", _marked("mistral", {"[TOOL_CALLS]": readers.read_mistral}, ends=("[ARGS]", "[CALL_ID]"))),
    (
        "<|channel|>",
        ToolFormat(
            "harmony",
            _HARMONY,
            dropped=("<|end|>", "<|return|>"),
            keeps_special=(*_HARMONY, "<|message|>", "<|constrain|>", "<|end|>", "<|call|>"),
        ),
    ),
    ("<|tool_call|>", _marked("tool_list", {"<|tool_call|>": _LIST, "<tool_call>": _LIST}, ends=("<|/tool_call|>",))),
    (
        "<tool_call>",
        _marked("tool_call", {"<tool_call>": readers.read_tool_call, **_FUNCTION}, ends=("</tool_call>",)),
    ),
    (
        "<|plugin|>",
        replace(
            _marked("internlm", {_PLUGIN: readers.read_json("<|action_end|>")}),
            keeps_special=("<|action_start|>", "<|plugin|>", "<|action_end|>"),
        ),
    ),
    (
        "<|START_ACTION|>",
        _marked(
            "cohere2", {"<|START_ACTION|>": readers.read_json("<|END_ACTION|>")}, ends=("<|END_ACTION|>",), json=False
        ),
    ),
    ("Action: ```json", ToolFormat("cohere", {"Action:": readers.read_json()})),
    ("<|observation|>", _GLM),
    ("'observation'", _GLM),
    ("<|python_tag|>", _marked("llama", {"<|python_tag|>": readers.read_json(), **_FUNCTION})),
    ("functools[", ToolFormat("functools", {"functools": readers.read_json()}, _JSON)),
)


def find_tool_format(tokenizer: Tokenizer) -> ToolFormat | None:
    """How a model writes its calls, from its chat template and its special tokens; None: it has no chat template."""
    if tokenizer.chat_template is None:
        return None
    template = "\n".join(tokenizer.chat_template.sources().values())
    for marker, form in _FORMATS:
        if marker in template:
            return form
    # Templates that name no marker (Llama 3.1's own, InternLM2's) have it among their tokens.
    for marker, form in _FORMATS:
        index = tokenizer.backend.token_to_id(marker)
        if index is not None and index in tokenizer.special_ids:
            return form
    return PLAIN


def forced_schema(tools: Sequence[Mapping[str, Any]], name: str | None = None) -> dict[str, Any]:
    """A JSON schema of one call of these functions, or of the one that is named; `PLAIN` reads what it makes."""
    each = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["name"]},
                "arguments": tool.get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
        if name is None or tool["name"] == name
    ]
    return each[0] if len(each) == 1 else {"anyOf": each}
