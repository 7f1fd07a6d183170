"""Checked access to the fields of a row: every problem names file:line, the field, what it is and what it should be."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from oarsmith.data.records import Record
from oarsmith.errors import DataError

# JSON can spell half of a surrogate pair ("\ud83d"); such a string is no text and no tokenizer takes it.
_SURROGATE = re.compile("[\ud800-\udfff]")


def shape(value: Any) -> str:
    """A value in a few words, for error messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the string {value[:40]!r}"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object with {', '.join(map(str, list(value)[:6])) or 'no fields'}"
    return f"a {type(value).__name__}"


def bad_field(record: Record, name: str, value: Any, expected: str, fix: str | None = None) -> DataError:
    """The error for a field of the wrong shape."""
    hint = fix or f"give '{name}' as {expected}"
    return DataError(f"field '{name}' is {shape(value)}, expected {expected}", where=record.where, fix=hint)


def text(record: Record, name: str, value: Any) -> str:
    """`value` as text; `name` is only for the message."""
    if not isinstance(value, str):
        raise bad_field(record, name, value, "a string")
    broken = _SURROGATE.search(value)
    if broken:
        what = f"field '{name}' holds half a character (\\u{ord(broken.group()):04x}) at position {broken.start()}"
        raise DataError(what, where=record.where, fix="write characters beyond U+FFFF as a whole surrogate pair")
    return value


def optional_text(record: Record, name: str, value: Any) -> str | None:
    """As `text`, with null (and a missing field) as None."""
    return None if value is None else text(record, name, value)


def items(record: Record, name: str, value: Any, expected: str) -> list[Any]:
    """`value` as a list with something in it."""
    if not isinstance(value, list):
        raise bad_field(record, name, value, expected)
    if not value:
        raise DataError(
            f"field '{name}' is an empty list, expected {expected}", where=record.where, fix="remove the row or fill it"
        )
    return value


def mapping(record: Record, name: str, value: Any, expected: str) -> dict[str, Any]:
    """`value` as an object."""
    if not isinstance(value, dict):
        raise bad_field(record, name, value, expected)
    return value


def weight(record: Record, name: str, value: Any) -> float | None:
    """A loss weight: a finite number >= 0, or None where the row gives none."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise bad_field(record, name, value, "a number >= 0")
    if not math.isfinite(value) or value < 0:
        raise bad_field(record, name, value, "a finite number >= 0")
    return float(value)


def from_json(record: Record, name: str, value: str) -> Any:
    """A field that holds JSON as text."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        what = f"field '{name}' is not JSON: {error}; it begins with {value[:60]!r}"
        raise DataError(what, where=record.where, fix=f"write '{name}' as JSON text") from error


def without_nulls(value: Mapping[str, Any]) -> dict[str, Any]:
    """The object without its null fields: parquet gives every row the union of all rows' fields."""
    return {name: item for name, item in value.items() if item is not None}
