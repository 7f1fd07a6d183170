"""The jinja2 sandbox every chat template runs in: same dialect as transformers, with limits.

A template comes with the checkpoint, so it is untrusted: it cannot reach Python objects (jinja2's immutable sandbox),
and a meter stops one that loops or grows without end (`meter.py`; `range` is limited by jinja2 itself).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, wraps
from types import BuiltinMethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from oarsmith.errors import CheckpointError, DataError
from oarsmith.text.meter import (
    METER,
    STEPS_PER_CALL,
    Meter,
    MeterInserter,
    TemplateLimitError,
    check_growth,
    check_text,
    metered_filter,
    metered_loop,
    metered_text,
    scan_cost,
)
from oarsmith.text.rendered import border, control

# What a template can raise: its own words (TemplateError) or Python's about values it did not expect.
TEMPLATE_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation.

    Attributes:
        text: what is tokenized (with add_special_tokens=False: the template writes BOS itself).
        generated: [start, end) character spans inside `{% generation %}` blocks (or PaddleNLP bot parts); empty when
            the template marks none.
        marked: the text still holds the marks of `rendered.control` and `rendered.border`.
    """

    text: str
    generated: tuple[tuple[int, int], ...]
    marked: bool = False


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant wrote. Renders its body and records its span."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_record"), [], [], body).set_lineno(line)

    def _record(self, caller: Callable[[], str]) -> str:
        text = caller()
        meter = METER.get()
        meter.spans.append((meter.length, meter.length + len(text)))
        return text


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        MeterInserter().visit(tree)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            count, many = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(many, (str, list, tuple)) and isinstance(count, int):
                check_text(len(many) * count)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            check_text(left.bit_length() * max(right, 0))
        elif operator == "%" and isinstance(left, str):
            check_growth("format", (left, *(right if isinstance(right, tuple) else (right,))))
        result = super().call_binop(context, operator, left, right)
        return metered_text(result) if operator == "+" and isinstance(result, (str, list, tuple)) else result

    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        # jinja2 returns a value that prints as nothing; a template that tries this is not one to go on with.
        raise jinja2.exceptions.SecurityError(
            f"access to attribute '{attribute}' of a value of type '{type(obj).__name__}'"
        )

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        # jinja2 puts its own function in the place of str.format, so `call` no longer sees the text.
        formatter = super().wrap_str_format(value)
        if formatter is None or not isinstance(value, BuiltinMethodType):
            return formatter

        @wraps(formatter)
        def checked(*args: Any, **kwargs: Any) -> str:
            check_growth("format", (value.__self__, *args, *kwargs.values()))
            return formatter(*args, **kwargs)

        return checked

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - jinja2's own spelling
        if isinstance(__obj, BuiltinMethodType) and isinstance(__obj.__self__, str):
            check_growth(__obj.__name__, (__obj.__self__, *args))
            METER.get().charge(scan_cost(__obj.__self__) + sum(map(scan_cost, args)))
        METER.get().charge(STEPS_PER_CALL)
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str):
            check_text(len(result))
        return result


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _is_in(value: Any, container: Any) -> bool:
    return value in container


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _control(token: str) -> str:
    METER.get().marked = True
    return control(token)


def _border() -> str:
    METER.get().marked = True
    return border()


@lru_cache(maxsize=2)
def _environment(keep_trailing_newline: bool) -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=keep_trailing_newline,
        extensions=[GenerationTag, loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    for name, function in list(environment.filters.items()):
        environment.filters[name] = metered_filter(name, function)
    environment.tests["in"] = metered_filter("in", _is_in)
    environment.filters["_metered_loop"] = metered_loop
    environment.filters["_metered_text"] = metered_text
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["control"] = _control
    environment.globals["border"] = _border
    return environment


@lru_cache(maxsize=64)
def compile_template(source: str, *, keep_trailing_newline: bool = False) -> jinja2.Template:
    """Compile a chat template. Raises CheckpointError with jinja2's message and line for a syntax error."""
    try:
        return _environment(keep_trailing_newline).from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(
            f"the chat template does not parse: {error.message}",
            where=f"chat template, line {error.lineno}",
            fix="correct the template, or choose a built-in one such as chatml",
        ) from error


def run_template(template: jinja2.Template, variables: Mapping[str, Any]) -> Rendering:
    """Render under the limits.

    Raises one of TEMPLATE_FAILURES; TemplateLimitError when a limit is passed.
    """
    meter = Meter()
    token = METER.set(meter)
    blocks = []
    try:
        # Streamed: each block is counted before the next one runs, which gives a generation block its position.
        for block in template.generate(dict(variables)):
            blocks.append(block)
            meter.length += len(block)
            check_text(meter.length)
    finally:
        METER.reset(token)
    return Rendering("".join(blocks), tuple(meter.spans), meter.marked)


def failure(error: Exception, *, where: str) -> DataError:
    """The user's error for what a template raised."""
    if isinstance(error, TemplateLimitError):
        return DataError(str(error), where=where, fix="use a template without runaway loops, or shorter messages")
    if isinstance(error, jinja2.exceptions.SecurityError):
        return DataError(f"the chat template did something the sandbox forbids: {error}", where=where)
    if isinstance(error, jinja2.TemplateError):
        return DataError(f"the chat template refused the conversation: {error}", where=where)
    if isinstance(error, RecursionError):
        return DataError("the chat template calls itself without end", where=where)
    return DataError(f"the chat template cannot render the conversation: {type(error).__name__}: {error}", where=where)
