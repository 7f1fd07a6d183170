"""What follows a marker, family by family.

A reader stands behind the marker it is given. It returns the calls that follow, or None where none does: the marker
stays text then, and reading goes on right behind it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from oarsmith.text.tools.source import Reading, Source
from oarsmith.text.tools.values import Schemas, ToolCall, call_of, calls_of_json, calls_of_python, json_of, typed

Reader = Callable[[Source, str, Schemas], Reading[list[ToolCall] | None]]

SPACE = re.compile(r"\s*")
NAME = re.compile(r"[\w.-]*")
_NOT_LINE = re.compile(r"[^\n<]*")


def read_json(*ends: str, explicit: bool = False) -> Reader:
    """JSON of calls, perhaps in a fenced block, several with ``;`` between; one of ``ends`` may stand behind it."""

    def read(source: Source, marker: str, schemas: Schemas) -> Reading[list[ToolCall] | None]:
        if marker in ("{", "["):
            source.at -= 1
        yield from source.span(SPACE)
        fenced = yield from source.one_of(("```json", "```"))
        yield from source.span(SPACE)
        calls = calls_of_json((yield from source.json()), explicit=explicit)
        if calls is None:
            return None
        yield from _end(source, ("```", *ends) if fenced else ends)
        return calls

    return read


def read_tool_call(source: Source, marker: str, schemas: Schemas) -> Reading[list[ToolCall] | None]:
    """``<tool_call>``: JSON (Hermes, Qwen), ``<function=`` (Qwen3-Coder), or a name and its arguments (GLM-4.5)."""
    yield from source.span(SPACE)
    if (yield from source.one_of(("<function=",))):
        calls = yield from read_function(source, marker, schemas)
    elif (yield from source.one_of(("{", "["))):
        source.at -= 1
        calls = calls_of_json((yield from source.json()))
    else:
        calls = yield from _read_pairs(source, schemas)
    if calls is not None:
        yield from _end(source, ("</tool_call>",))
    return calls


def read_function(source: Source, marker: str, schemas: Schemas) -> Reading[list[ToolCall] | None]:
    """``name>``, then ``<parameter=key>value</parameter>`` for each, or JSON; ``</function>``."""
    name = (yield from source.span(NAME)).strip()
    if not name or not (yield from source.one_of((">",))):
        return None
    yield from source.span(SPACE)
    if (yield from source.one_of(("{",))):
        source.at -= 1
        text = yield from source.json()
        call = None if text is None else call_of(name, json_of(text))
        yield from _end(source, ("</function>",))
        return None if call is None else [call]
    arguments = {}
    while (yield from source.one_of(("<parameter=",))):
        key, value = (yield from source.until(">")), (yield from source.until("</parameter>"))
        if key is None or value is None:
            return None
        value = value.removeprefix("\n").removesuffix("\n")
        arguments[key.strip()] = typed(value, name, key.strip(), schemas)
        yield from source.span(SPACE)
    if not (yield from source.one_of(("</function>",))):
        return None
    call = call_of(name, arguments)
    return None if call is None else [call]


def _read_pairs(source: Source, schemas: Schemas) -> Reading[list[ToolCall] | None]:
    name = (yield from source.span(_NOT_LINE)).strip()
    if not re.fullmatch(r"[\w.-]+", name):
        return None
    arguments = {}
    yield from source.span(SPACE)
    while (yield from source.one_of(("<arg_key>",))):
        key = yield from source.until("</arg_key>")
        yield from source.span(SPACE)
        if key is None or not (yield from source.one_of(("<arg_value>",))):
            return None
        value = yield from source.until("</arg_value>")
        if value is None:
            return None
        arguments[key.strip()] = typed(value, name, key.strip(), schemas)
        yield from source.span(SPACE)
    if not (yield from source.one_of(("</tool_call>",))):
        return None
    call = call_of(name, arguments)
    return None if call is None else [call]


def read_mistral(source: Source, marker: str, schemas: Schemas) -> Reading[list[ToolCall] | None]:
    """A JSON list (v3), or ``name[ARGS]{...}`` (v11), with ``[CALL_ID]id`` before the arguments (v13)."""
    yield from source.span(SPACE)
    if (yield from source.one_of(("[", "{"))):
        source.at -= 1
        return calls_of_json((yield from source.json()))
    name = yield from source.span(NAME)
    if (yield from source.one_of(("[CALL_ID]",))):
        yield from source.span(NAME)
    yield from source.one_of(("[ARGS]",))
    yield from source.span(SPACE)
    text = yield from source.json()
    call = None if text is None else call_of(name, json_of(text))
    return None if call is None else [call]


def read_deepseek(source: Source, marker: str, schemas: Schemas) -> Reading[list[ToolCall] | None]:
    """``function<｜tool▁sep｜>name`` and a fenced block (V3, R1), or ``name<｜tool▁sep｜>{...}`` (V3.1)."""
    if marker == "<｜tool▁calls▁begin｜>":
        yield from source.span(SPACE)
        if not (yield from source.one_of(("<｜tool▁call▁begin｜>",))):
            return None
    name = yield from source.until("<｜tool▁sep｜>")
    yield from source.span(SPACE)
    if name is not None and name.strip() == "function":
        name = yield from source.until("```")
        yield from source.one_of(("json",))
        yield from source.span(SPACE)
    text = yield from source.json()
    call = None if text is None else call_of(name, json_of(text))
    if call is None:
        return None
    yield from _end(source, ("```",))
    yield from _end(source, ("<｜tool▁call▁end｜>",))
    yield from _end(source, ("<｜tool▁calls▁end｜>",))
    return [call]


def read_glm(source: Source, marker: str, schemas: Schemas) -> Reading[list[ToolCall] | None]:
    """A name on a line, then JSON (GLM-4) or a block with ``tool_call(key=value)`` (ChatGLM3)."""
    name = yield from source.span(NAME)
    if not (yield from source.one_of(("\n", " \n"))):
        return None
    if (yield from source.one_of(("```python\n",))):
        called = calls_of_python((yield from source.until("```")) or "")
        return None if called is None or len(called) > 1 else [ToolCall(name, called[0].arguments)]
    text = yield from source.json()
    call = None if text is None else call_of(name, json_of(text))
    return None if call is None else [call]


def read_harmony(source: Source, marker: str, schemas: Schemas) -> Reading[list[ToolCall] | None]:
    """A message's header; one to ``functions.name`` is a call, and one on the channel ``analysis`` is not shown."""
    header = yield from source.until("<|message|>")
    if header is None:
        return None
    to = re.search(r"to=functions\.([\w.-]+)", header)
    if to is None:
        if "analysis" in header and (yield from source.until("<|end|>")) is None:
            source.at = len(source.text)
        return []
    yield from source.span(SPACE)
    text = yield from source.json()
    call = None if text is None else call_of(to[1], json_of(text))
    if call is None:
        return None
    yield from _end(source, ("<|call|>", "<|end|>"))
    return [call]


def read_python(source: Source, marker: str, schemas: Schemas) -> Reading[list[ToolCall] | None]:
    """A fenced block ``tool_code`` with calls as Python has them (Gemma)."""
    text = yield from source.until("```")
    if text is None:
        return None
    text = text.strip()
    return calls_of_python(text[6:-1] if text.startswith("print(") and text.endswith(")") else text)


def read_list(source: Source, marker: str, schemas: Schemas) -> Reading[list[ToolCall] | None]:
    """``[`` of a list: of JSON, or of calls as Python has them (Llama 4, Gemma 3)."""
    source.at -= 1
    text = yield from source.bracketed("[")
    if text is None:
        return None
    return calls_of_json(text, explicit=True) or calls_of_python(text)


def _end(source: Source, ends: tuple[str, ...]) -> Reading[None]:
    """Reads white space and an end that stands there; calls without one are taken too."""
    yield from source.span(SPACE)
    yield from source.one_of(ends)
