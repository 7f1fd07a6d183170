"""Mathematical expressions, plain or in LaTeX, as trees; nothing of them is executed.

Grammar: sums of products of powers, functions, fractions, roots, factorials, absolute values, mixed numbers; a
product's cross may be left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARACTERS = 600
_MAX_DEPTH = 40
_FUNCTIONS = frozenset(
    (
        *("sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "asin", "acos", "atan"),
        *("sinh", "cosh", "tanh", "ln", "log", "exp", "sqrt", "abs"),
    )
)
_GREEK = frozenset(
    (
        *("alpha", "beta", "gamma", "delta", "theta", "lambda", "mu"),
        *("sigma", "phi", "omega", "epsilon", "rho", "tau"),
    )
)
_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?)"
    r"|(?P<command>\\[A-Za-z]+)|(?P<word>[A-Za-z]+)|(?P<sign>\*\*|[-+*/^(){}\[\]|!,=_%<>]))"
)
_SAME = {"\\times": "*", "\\cdot": "*", "\\div": "/", "**": "^", "\\lvert": "|", "\\rvert": "|"}
_SAME |= {"\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac"}


class NoExpressionError(Exception):
    """A text that is none; always caught here."""


@dataclass(frozen=True)
class Node:
    """A number (``value``), a name (``name`` without parts), or an operation (``name``) on parts."""

    name: str
    parts: tuple[Node, ...] = ()
    value: Fraction = Fraction(0)


def parse(text: str) -> Node | None:
    """The tree; None: the text is no expression of this grammar, or too long."""
    if len(text) > MAX_CHARACTERS:
        return None
    try:
        parser = _Parser(_tokens(text))
        found = parser.sum()
        return found if parser.at == len(parser.tokens) else None
    except NoExpressionError:
        return None


def _tokens(text: str) -> list[str]:
    tokens, at, text = [], 0, text.rstrip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise NoExpressionError
        at, token = found.end(), found[0].strip()
        if found["word"] and token not in _FUNCTIONS and token not in ("pi", "e"):
            tokens += list(token) if token not in _GREEK else [token]
        else:
            tokens.append(_SAME.get(token, token))
    return tokens


class _Parser:
    """Recursive descent with one token of look-ahead and a bound on depth."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.at, self._depth, self._bars = tokens, 0, 0, 0

    def sum(self) -> Node:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise NoExpressionError
        found = self._product()
        while self._next() in ("+", "-"):
            sign = self._take()
            right = self._product()
            found = Node("+", (found, right if sign == "+" else _negative(right)))
        self._depth -= 1
        return found

    def _product(self) -> Node:
        if self._next() in ("+", "-"):
            sign = self._take()
            self._depth += 1
            if self._depth > _MAX_DEPTH:
                raise NoExpressionError
            found = self._product()
            self._depth -= 1
            return found if sign == "+" else _negative(found)
        found = self._power()
        while True:
            token = self._next()
            if token in ("*", "/"):
                self._take()
                right = _negative(self._power()) if self._taken("-") else self._power()
                found = Node(token, (found, right))
            elif self._begins_factor(token):
                mixed = token == "\\frac" and _is_integer(found)
                right = self._power()
                found = Node("+" if mixed and _is_ratio(right) else "*", (found, right))
            else:
                return found

    def _begins_factor(self, token: str) -> bool:
        if token == "|":
            return self._bars == 0
        return bool(token) and (token[0].isalnum() or token[0] == "." or token in ("(", "{") or token[0] == "\\")

    def _power(self) -> Node:
        found = self._atom()
        while self._taken("!"):
            found = Node("!", (found,))
        if self._taken("%"):
            found = Node("/", (found, _number("100")))
        if self._taken("^"):
            if self._next() == "{":
                return Node("^", (found, self._group("{", "}")))
            if self._taken("-"):
                return Node("^", (found, _negative(self._power())))
            return Node("^", (found, self._power()))
        return found

    def _atom(self) -> Node:
        token = self._take()
        if token[0].isdigit() or token[0] == ".":
            return _number(token)
        if token in ("(", "{"):
            self.at -= 1
            return self._group(token, {"(": ")", "{": "}"}[token])
        if token == "|":
            self._bars += 1
            inside = self.sum()
            self._bars -= 1
            self._expect("|")
            return Node("abs", (inside,))
        name = token.lstrip("\\")
        if token == "\\frac":
            return Node("/", (self._argument(), self._argument()))
        if name == "sqrt":
            return self._root()
        if name in _FUNCTIONS:
            return self._function(name)
        if name == "pi" or name in _GREEK or (len(name) == 1 and name.isalpha()):
            if self._taken("_"):
                index = self._argument()
                name = f"{name}_{index.value if index.name == '#' else index.name}"
            return Node(name)
        raise NoExpressionError

    def _root(self) -> Node:
        if not self._taken("["):
            return Node("sqrt", (self._argument(),))
        degree = self.sum()
        self._expect("]")
        return Node("^", (self._argument(), Node("/", (_number("1"), degree))))

    def _function(self, name: str) -> Node:
        base = self._argument() if name == "log" and self._taken("_") else None
        power = None
        if self._taken("^"):
            power = self._argument()
        inside = self._group("(", ")") if self._next() == "(" else self._power()
        found = Node(name, (inside,) if base is None else (inside, base))
        return found if power is None else Node("^", (found, power))

    def _argument(self) -> Node:
        r"""A group, or one character: \frac12 is a half."""
        if self._next() in ("{", "("):
            token = self._next()
            return self._group(token, "}" if token == "{" else ")")
        token = self._next()
        if len(token) > 1 and token.isdigit():
            self.tokens[self.at : self.at + 1] = list(token)
        return self._atom()

    def _group(self, opens: str, closes: str) -> Node:
        self._expect(opens)
        bars, self._bars = self._bars, 0
        found = self.sum()
        self._bars = bars
        self._expect(closes)
        return found

    def _next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def _take(self) -> str:
        token = self._next()
        if not token:
            raise NoExpressionError
        self.at += 1
        return token

    def _taken(self, token: str) -> bool:
        found = self._next() == token
        self.at += found
        return found

    def _expect(self, token: str) -> None:
        if not self._taken(token):
            raise NoExpressionError


def _number(text: str) -> Node:
    return Node("#", value=Fraction(text))


def _negative(node: Node) -> Node:
    return Node("#", value=-node.value) if node.name == "#" else Node("neg", (node,))


def _is_integer(node: Node) -> bool:
    return node.name == "#" and node.value.denominator == 1


def _is_ratio(node: Node) -> bool:
    return node.name == "/" and all(_is_integer(part) for part in node.parts)
