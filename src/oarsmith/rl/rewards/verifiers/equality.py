"""Whether two mathematical answers are the same: exactly where they are rational, else by value at several points.

Two expressions that agree at points drawn by chance are equal but for a probability of nothing (Schwartz 1980, Zippel
1979). It takes microseconds and always ends, which a computer algebra's ``simplify`` does not.
"""

from __future__ import annotations

import cmath
import math
import random
import re
from collections.abc import Mapping
from fractions import Fraction

from oarsmith.rl.rewards.verifiers.expression import MAX_CHARACTERS, Node, parse

_MAX_EXPONENT, _MAX_FACTORIAL, _MAX_BITS = 2000, 170, 20_000
_NUM_POINTS, _TOLERANCE = 6, 1e-9
_CONSTANTS: Mapping[str, complex] = {"pi": math.pi, "e": math.e, "i": 1j}
_DROPPED = re.compile(
    r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr|displaystyle|limits|mathrm\{~\}|,|;|:|!|quad|qquad|\$| )(?![A-Za-z])"
)
_UNITS = re.compile(r"\\(?:text|mathrm|textbf|mbox|operatorname|mathbf)\s*\{([^{}]*)\}")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|°")
_THOUSANDS = re.compile(r"(?<![\d.])(\d{1,3}(?:(?:,|\{,\})\d{3})+)(?![\d])")
_OPENING = {"(": ")", "[": "]", "{": "}"}


def equal(answer: str, reference: str) -> bool:
    """Whether an answer is the reference: as texts, numbers, expressions, or lists of such; percentages also as the
    number before the sign. What is nested too deeply is equal to nothing but itself."""
    if max(len(answer), len(reference)) > MAX_CHARACTERS:
        return answer.strip() == reference.strip()
    try:
        return _equal(answer, reference)
    except RecursionError:
        return False


def _equal(answer: str, reference: str) -> bool:
    mine, theirs = normalised(answer), normalised(reference)
    if mine == theirs:
        return mine != ""
    if not mine or not theirs:
        return False
    if "=" in mine and "=" not in theirs:
        mine = mine.rpartition("=")[2].strip()
    elif "=" in mine and "=" in theirs and mine.count("=") == theirs.count("=") == 1:
        return _equal_equations(mine, theirs)
    elif "=" in theirs and "=" not in mine:
        theirs = theirs.rpartition("=")[2].strip()
    lists = _parts(mine), _parts(theirs)
    if lists[0] is not None or lists[1] is not None:
        return _equal_lists(mine, theirs)
    return _equal_values(mine, theirs)


def normalised(text: str) -> str:
    """An answer without what changes nothing: signs of money, units in text, spacing, a full stop, thousands'
    commas."""
    text = text.strip().strip("$").strip().rstrip(".。").strip()
    text = re.sub(r"\\\((.*)\\\)", r"\1", text)
    text = _DROPPED.sub(" ", text).replace("\\%", "%").replace("−", "-").replace("×", "*").replace("π", "\\pi")
    text = text.replace("\\{", "{").replace("\\}", "}").replace("√", "\\sqrt").replace("÷", "/")
    whole = _UNITS.fullmatch(text)
    text = whole[1] if whole else _UNITS.sub(" ", text)
    text = _DEGREES.sub("", text).replace("\\$", "").replace("$", "")
    text = _THOUSANDS.sub(lambda found: found[1].replace("{,}", "").replace(",", ""), text)
    return re.sub(r"\s+", " ", text).strip().strip("*").strip().casefold() if not _has_command(text) else text.strip()


def _has_command(text: str) -> bool:
    return "\\" in text


def _equal_values(mine: str, theirs: str) -> bool:
    a, b = parse(mine), parse(theirs)
    if a is None or b is None:
        return re.sub(r"\s", "", mine).casefold() == re.sub(r"\s", "", theirs).casefold()
    if _same(a, b):
        return True
    if mine.endswith("%") != theirs.endswith("%"):
        a, b = parse(mine.removesuffix("%")), parse(theirs.removesuffix("%"))
        return a is not None and b is not None and _same(a, b)
    return False


def _equal_equations(mine: str, theirs: str) -> bool:
    """Sides equal in either order, or one difference a multiple of the other."""
    sides = [[parse(side) for side in text.split("=")] for text in (mine, theirs)]
    (a, b), (c, d) = sides
    if a is None or b is None or c is None or d is None:
        return False
    if (_same(a, c) and _same(b, d)) or (_same(a, d) and _same(b, c)):
        return True
    first, second = (Node("+", (x, Node("neg", (y,)))) for x, y in ((a, b), (c, d)))
    ratios = []
    for point in _points(first, second):
        value, other = _value(first, point), _value(second, point)
        if value is None or other is None or abs(value) < _TOLERANCE or abs(other) < _TOLERANCE:
            return False
        ratios.append(value / other)
    return all(_close(ratio, ratios[0]) for ratio in ratios)


def _equal_lists(mine: str, theirs: str) -> bool:
    a, b = _parts(mine), _parts(theirs)
    if a is None or b is None or len(a[1]) != len(b[1]) or len(a[1]) > 64:
        return False
    kinds = {a[0], b[0]}
    if kinds not in ({""}, {"()"}, {"[]"}, {"{}"}, {"", "()"}, {"", "{}"}, {"(]"}, {"[)"}):
        return False
    if kinds & {"{}"} or kinds == {""}:  # sets: in any order
        left = list(b[1])
        for part in a[1]:
            match = next((other for other in left if equal(part, other)), None)
            if match is None:
                return False
            left.remove(match)
        return True
    return all(equal(x, y) for x, y in zip(a[1], b[1], strict=True))


def _parts(text: str) -> tuple[str, list[str]] | None:
    """The brackets around a list and its parts; None: it is none. A single value in brackets is none either."""
    kind, inside = "", text
    if len(text) >= 2 and text[0] in _OPENING and text[-1] in ")]}" and _closes_at_end(text):
        kind, inside = text[0] + text[-1], text[1:-1]
    parts, depth, start = [], 0, 0
    for at, character in enumerate(inside):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(inside[start:at].strip())
            start = at + 1
    parts.append(inside[start:].strip())
    return (kind, parts) if len(parts) > 1 and all(parts) else None


def _closes_at_end(text: str) -> bool:
    depth = 0
    for at, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return at == len(text) - 1
    return False


def _same(a: Node, b: Node) -> bool:
    exact = _exact(a), _exact(b)
    if exact[0] is not None and exact[1] is not None:
        return exact[0] == exact[1]
    compared = 0
    for point in _points(a, b):
        value, other = _value(a, point), _value(b, point)
        if value is None and other is None:
            continue
        if value is None or other is None or not _close(value, other):
            return False
        compared += 1
    return compared > 0


def _close(a: complex, b: complex) -> bool:
    return abs(a - b) <= _TOLERANCE * max(1e-3, abs(a), abs(b))


def _points(*nodes: Node) -> list[dict[str, complex]]:
    names = sorted(set().union(*(_names(node) for node in nodes)) - _CONSTANTS.keys())
    draw = random.Random("equality")
    # Positive first, where roots and logarithms are; then anywhere.
    spans = [(0.3, 2.7)] * (_NUM_POINTS // 2) + [(-2.7, 2.7)] * (_NUM_POINTS - _NUM_POINTS // 2)
    return [{name: complex(draw.uniform(*span)) for name in names} for span in (spans if names else spans[:1])]


def _names(node: Node) -> set[str]:
    if not node.parts:
        return set() if node.name == "#" else {node.name}
    return set().union(*(_names(part) for part in node.parts))


def _exact(node: Node) -> Fraction | None:
    """Its value where it is rational and of bounded size."""
    if node.name == "#":
        return node.value
    parts = [_exact(part) for part in node.parts]
    if not parts or any(part is None for part in parts):
        return None
    values = [part for part in parts if part is not None]
    found = _exact_of(node.name, values)
    if found is not None and found.numerator.bit_length() + found.denominator.bit_length() > _MAX_BITS:
        return None
    return found


def _exact_of(name: str, values: list[Fraction]) -> Fraction | None:
    a = values[0]
    b = values[1] if len(values) > 1 else Fraction(0)
    if name == "+":
        return a + b
    if name == "*":
        return a * b
    if name == "/":
        return a / b if b else None
    if name in ("neg", "abs"):
        return -a if name == "neg" else abs(a)
    if name == "!":
        fits = a.denominator == 1 and 0 <= a <= _MAX_FACTORIAL
        return Fraction(math.factorial(int(a))) if fits else None
    if name == "^" and b.denominator == 1 and abs(b) <= _MAX_EXPONENT and (a or b > 0):
        bits = max(a.numerator.bit_length(), a.denominator.bit_length()) * abs(int(b))
        return a ** int(b) if bits <= _MAX_BITS else None
    if name == "sqrt" and a >= 0:
        top, bottom = math.isqrt(a.numerator), math.isqrt(a.denominator)
        return Fraction(top, bottom) if top * top == a.numerator and bottom * bottom == a.denominator else None
    return None


def _value(node: Node, point: Mapping[str, complex]) -> complex | None:
    """Its value at a point; None: there is none."""
    try:
        found = _computed(node, point)
    except (ArithmeticError, ValueError):
        return None
    return found if cmath.isfinite(found) else None


_ONE_PLACE = {
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "sinh": cmath.sinh,
    "cosh": cmath.cosh,
    "tanh": cmath.tanh,
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "asin": cmath.asin,
    "acos": cmath.acos,
    "atan": cmath.atan,
    "ln": cmath.log,
    "exp": cmath.exp,
    "sqrt": cmath.sqrt,
}


def _computed(node: Node, point: Mapping[str, complex]) -> complex:
    if node.name == "#":
        return complex(float(node.value))
    if not node.parts:
        return point[node.name] if node.name in point else _CONSTANTS[node.name]
    values = [_computed(part, point) for part in node.parts]
    a = values[0]
    if node.name in _ONE_PLACE:
        return _ONE_PLACE[node.name](a)
    if node.name in ("cot", "sec", "csc"):
        below = {"cot": cmath.tan, "sec": cmath.cos, "csc": cmath.sin}[node.name](a)
        return 1 / below
    if node.name == "log":
        return cmath.log(a) / cmath.log(values[1]) if len(values) > 1 else cmath.log10(a)
    if node.name in ("neg", "abs"):
        return -a if node.name == "neg" else complex(abs(a))
    if node.name == "!":
        return complex(math.gamma(a.real + 1)) if a.imag == 0 else complex(math.nan)
    b = values[1]
    if node.name == "^":
        return a**b
    return a + b if node.name == "+" else a * b if node.name == "*" else a / b
