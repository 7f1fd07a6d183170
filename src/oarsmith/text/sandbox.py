"""The jinja2 sandbox every chat template runs in: same dialect as transformers, with limits.

A template comes with the checkpoint, so it is untrusted: it cannot reach Python objects (jinja2's immutable sandbox), and
a meter stops one that loops or grows without end. Charged are loop iterations, calls, filters and the text they
touch; `range` is limited by jinja2 itself (`MAX_RANGE`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache, wraps
from types import BuiltinMethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from oarsmith.errors import CheckpointError, DataError

MAX_STEPS = 4_000_000
"""Loop iterations, calls and kilobytes touched in one rendering; a conversation of 10,000 messages uses about 1 %."""
MAX_TEXT = 32_000_000
"""Characters in any text a template builds; about eight million tokens."""

_PADDING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice", "tojson", "format"})
_FORMATTING = frozenset({"format", "format_map"})
_LONG_NUMBER = re.compile(r"\d{7,}")
_SIZED = (str, bytes, list, tuple, dict, set, range)
_JINJA_STATE = (jinja2.Environment, nodes.EvalContext, Context)
_CHARS_PER_STEP = 64
_CONCAT_CHARS_PER_STEP = 4096

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


class TemplateLimitError(jinja2.TemplateError):
    """A template used more steps or text than a chat can need."""


@dataclass(frozen=True)
class Rendering:
    """A rendered conversation.

    Attributes:
        text: what is tokenized (with add_special_tokens=False: the template writes BOS itself).
        generated: [start, end) character spans inside `{% generation %}` blocks (or PaddleNLP bot parts); empty when the
            template marks none.
    """

    text: str
    generated: tuple[tuple[int, int], ...]


@dataclass
class _Meter:
    """What one rendering has used, and where its `{% generation %}` blocks were."""

    steps: int = 0
    length: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)

    def charge(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise TemplateLimitError(f"the chat template ran more than {MAX_STEPS} steps")


_METER: ContextVar[_Meter] = ContextVar("chat_template_meter")


def _size(value: object) -> int:
    return len(value) if isinstance(value, _SIZED) else 0


def _check_text(length: int) -> None:
    if length > MAX_TEXT:
        raise TemplateLimitError(f"the chat template built a text longer than {MAX_TEXT} characters")


def _check_growth(name: str, args: Sequence[Any]) -> None:
    """Refuse, before it runs, an operation whose result would be far larger than what goes in."""
    if name in _PADDING:
        for arg in args[1:]:
            if isinstance(arg, int):
                _check_text(abs(arg))
    if name in _FORMATTING and isinstance(args[0], str):
        for digits in _LONG_NUMBER.findall(args[0]):
            _check_text(int(digits[:12]))
    elif name == "replace" and len(args) >= 3 and isinstance(args[0], str) and isinstance(args[1], str):
        _check_text(len(args[0]) + args[0].count(args[1]) * _size(args[2]))
    elif name == "join" and len(args) >= 2:
        text, items = (args[0], args[1]) if isinstance(args[0], str) else (args[1], args[0])
        _check_text(_size(text) * _size(items))


def _metered_loop(iterable: Any) -> Any:
    meter = _METER.get()
    if isinstance(iterable, Sized):
        meter.charge(len(iterable))
        return iterable
    return _counted(iter(iterable), meter)


def _counted(items: Iterator[Any], meter: _Meter) -> Iterator[Any]:
    for item in items:
        meter.charge(1)
        yield item


def _metered_text(text: Any) -> Any:
    length = _size(text)
    _check_text(length)
    _METER.get().charge(1 + length // _CONCAT_CHARS_PER_STEP)
    return text


def _metered_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # keeps jinja2's mark for filters that want the context
    def metered(*args: Any, **kwargs: Any) -> Any:
        # Filters that want jinja2's context get it first; what is filtered comes after it.
        values = args[1:] if args and isinstance(args[0], _JINJA_STATE) else args
        _check_growth(name, (*values, *kwargs.values()))
        result = function(*args, **kwargs)
        _METER.get().charge(1 + sum(map(_size, args)) // _CHARS_PER_STEP)
        _check_text(_size(result))
        return result

    return metered


class _MeterInserter(NodeTransformer):
    """Rewrites `for x in it` to iterate a metered `it`, and `a ~ b` to a checked text."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_metered_loop", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(node, "_metered_text", [], [], None, None, lineno=node.lineno)


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant wrote. Renders its body and records its span."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_record"), [], [], body).set_lineno(line)

    def _record(self, caller: Callable[[], str]) -> str:
        text = caller()
        meter = _METER.get()
        meter.spans.append((meter.length, meter.length + len(text)))
        return text


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _MeterInserter().visit(tree)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            count, many = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(many, (str, list, tuple)) and isinstance(count, int):
                _check_text(len(many) * count)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_text(left.bit_length() * max(right, 0))
        elif operator == "%" and isinstance(left, str):
            _check_growth("format", (left, *(right if isinstance(right, tuple) else (right,))))
        result = super().call_binop(context, operator, left, right)
        return _metered_text(result) if operator == "+" and isinstance(result, (str, list, tuple)) else result

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - jinja2's own spelling
        if isinstance(__obj, BuiltinMethodType) and isinstance(__obj.__self__, str):
            _check_growth(__obj.__name__, (__obj.__self__, *args))
        _METER.get().charge(1 + sum(map(_size, args)) // _CHARS_PER_STEP)
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str):
            _check_text(len(result))
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


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


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
        environment.filters[name] = _metered_filter(name, function)
    environment.filters["_metered_loop"] = _metered_loop
    environment.filters["_metered_text"] = _metered_text
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
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
            fix="correct the template, or choose a built-in one (chatml, llama-3, mistral, gemma)",
        ) from error


def run_template(template: jinja2.Template, variables: Mapping[str, Any]) -> Rendering:
    """Render under the limits.

    Raises one of TEMPLATE_FAILURES; TemplateLimitError when a limit is passed.
    """
    meter = _Meter()
    token = _METER.set(meter)
    blocks = []
    try:
        # Streamed: each block is counted before the next one runs, which gives a generation block its position.
        for block in template.generate(dict(variables)):
            blocks.append(block)
            meter.length += len(block)
            _check_text(meter.length)
    finally:
        _METER.reset(token)
    return Rendering("".join(blocks), tuple(meter.spans))


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
