"""Limits for chat templates: what one rendering may loop, call, copy and build."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence, Sized
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.visitor import NodeTransformer

MAX_STEPS = 5_000_000
"""Loop iterations and calls in one rendering, some seconds of work; 2,000 messages take 20,000 to 140,000."""
MAX_TEXT = 32_000_000
"""Characters in any text a template builds; about eight million tokens."""

_PADDING = frozenset(
    {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice", "tojson", "format"}
)
_FORMATTING = frozenset({"format", "format_map"})
_LONG_NUMBER = re.compile(r"\d{7,}")
_SIZED = (str, bytes, list, tuple, dict, set, range)
_JINJA_STATE = (jinja2.Environment, nodes.EvalContext, Context)
_CONSTANT_TIME = frozenset({"length", "count", "default", "d", "first", "last", "random"})
# Steps stand for about 100 ns each: a call, what scanning so many characters takes, what copying so many takes.
STEPS_PER_CALL = 5
_SCANNED_CHARS = 64
_COPIED_CHARS = 1024
_COPIED_ITEMS = 64


class TemplateLimitError(jinja2.TemplateError):
    """A template used more steps or text than a chat can need."""


@dataclass
class Meter:
    """What one rendering has used, and where its `{% generation %}` blocks were."""

    steps: int = 0
    length: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)
    marked: bool = False  # whether `control` or `border` was used

    def charge(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise TemplateLimitError(f"the chat template ran more than {MAX_STEPS} steps")


METER: ContextVar[Meter] = ContextVar("chat_template_meter")


def _size(value: object) -> int:
    return len(value) if isinstance(value, _SIZED) else 0


def scan_cost(value: object) -> int:
    """Steps for working through a value once: its items, or its characters in blocks."""
    return len(value) // _SCANNED_CHARS if isinstance(value, str) else _size(value)


def check_text(length: int) -> None:
    if length > MAX_TEXT:
        raise TemplateLimitError(f"the chat template built a text longer than {MAX_TEXT} characters")


def check_growth(name: str, args: Sequence[Any]) -> None:
    """Refuse, before it runs, an operation whose result would be far larger than what goes in."""
    if name in _PADDING:
        for arg in args[1:]:
            if isinstance(arg, int):
                check_text(abs(arg))
    if name in _FORMATTING and isinstance(args[0], str):
        for digits in _LONG_NUMBER.findall(args[0]):
            check_text(int(digits[:12]))
    elif name == "replace" and len(args) >= 3 and isinstance(args[0], str) and isinstance(args[1], str):
        check_text(len(args[0]) + args[0].count(args[1]) * _size(args[2]))
    elif name == "join" and len(args) >= 2:
        text, items = (args[0], args[1]) if isinstance(args[0], str) else (args[1], args[0])
        check_text(_size(text) * _size(items))


def metered_loop(iterable: Any) -> Any:
    meter = METER.get()
    if isinstance(iterable, Sized):
        meter.charge(len(iterable))
        return iterable
    return _counted(iter(iterable), meter)


def _counted(items: Iterator[Any], meter: Meter) -> Iterator[Any]:
    for item in items:
        meter.charge(1)
        yield item


def metered_text(text: Any) -> Any:
    size = _size(text)
    check_text(size)
    METER.get().charge(1 + size // (_COPIED_CHARS if isinstance(text, str) else _COPIED_ITEMS))
    return text


def metered_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # keeps jinja2's mark for filters that want the context
    def metered(*args: Any, **kwargs: Any) -> Any:
        # Filters that want jinja2's context get it first; what is filtered comes after it.
        values = args[1:] if args and isinstance(args[0], _JINJA_STATE) else args
        check_growth(name, (*values, *kwargs.values()))
        result = function(*args, **kwargs)
        METER.get().charge(STEPS_PER_CALL)
        if name not in _CONSTANT_TIME:
            METER.get().charge(sum(map(scan_cost, args)) + scan_cost(result))
        check_text(_size(result))
        return result

    return metered


class MeterInserter(NodeTransformer):
    """Has loops counted, and what `a ~ b`, `a[b:c]` and comparisons copy or scan."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_metered_loop", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _metered(node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _metered(node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Operand(self, node: nodes.Operand) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _metered(node.expr)
        return node


def _metered(node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, "_metered_text", [], [], None, None, lineno=node.lineno)
