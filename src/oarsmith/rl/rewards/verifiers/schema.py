"""Whether a JSON value fits a JSON schema (draft 2020-12, the keywords below; any other is refused beforehand)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from oarsmith.errors import ConfigError

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
}
_SAYS_NOTHING = frozenset(
    ("$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly", "format")
)
_MANY = ("allOf", "anyOf", "oneOf", "prefixItems")
_ONE = ("not", "items", "additionalProperties", "contains", "propertyNames", "if", "then", "else")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_PLAIN = (
    *("type", "enum", "const", "$ref", "required", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("multipleOf", "minLength", "maxLength", "pattern", "minItems", "maxItems", "uniqueItems", "minProperties"),
    *("maxProperties", "dependentRequired"),
)
_MAX_DEPTH = 60


class Schema:
    """A schema that is read once.

    Raises:
        ConfigError: it is none, or has a keyword that would not be honoured.
    """

    def __init__(self, schema: Any) -> None:
        self._root = schema
        self._read(schema, "schema", 0)

    def fits(self, value: Any) -> bool:
        """Whether the value fits; a value nested too deeply does not."""
        return self._fits(self._root, value, 0)

    def _read(self, schema: Any, where: str, depth: int) -> None:
        if isinstance(schema, bool):
            return
        if not isinstance(schema, Mapping):
            raise ConfigError(f"a {type(schema).__name__} is no JSON schema", where=where, fix="give an object")
        if depth > _MAX_DEPTH:
            raise ConfigError(f"the JSON schema is nested deeper than {_MAX_DEPTH}", where="schema")
        for key, inner in schema.items():
            if key in _ONE:
                self._read(inner, f"{where}.{key}", depth + 1)
            elif key in _MANY and isinstance(inner, Sequence):
                for number, one in enumerate(inner):
                    self._read(one, f"{where}.{key}[{number}]", depth + 1)
            elif key in _NAMED and isinstance(inner, Mapping):
                for name, one in inner.items():
                    self._read(one, f"{where}.{key}.{name}", depth + 1)
            elif key in _PLAIN:
                self._read_plain(key, inner, f"{where}.{key}")
            elif key not in _SAYS_NOTHING:
                known = ", ".join((*_PLAIN, *_MANY, *_ONE, *_NAMED))
                raise ConfigError(f"the keyword '{key}' is not known", where=where, fix=f"known are {known}")

    def _read_plain(self, key: str, value: Any, where: str) -> None:
        if key == "$ref":
            self._target(value)
        if key == "pattern":
            try:
                re.compile(value)
            except (re.error, TypeError) as error:
                raise ConfigError(f"{value!r} is no pattern", where=where) from error
        if key == "type":
            kinds = value if isinstance(value, list) else [value]
            wrong = [kind for kind in kinds if kind not in (*_TYPES, "number", "integer")]
            if wrong:
                raise ConfigError(f"there is no type {wrong[0]!r}", where=where)

    def _target(self, reference: Any) -> Any:
        parts = str(reference).split("/")
        found: Any = self._root
        for part in parts[1:] if parts[0] == "#" else ["\0"]:
            part = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or part not in found:
                raise ConfigError(f"$ref {reference!r} leads nowhere", where="schema", fix="use #/$defs/name")
            found = found[part]
        return found

    def _fits(self, schema: Any, value: Any, depth: int) -> bool:
        if isinstance(schema, bool):
            return schema
        if depth > _MAX_DEPTH:
            return False
        if "$ref" in schema and not self._fits(self._target(schema["$ref"]), value, depth + 1):
            return False
        if "type" in schema and not _is_type(schema["type"], value):
            return False
        if "enum" in schema and not any(_same(value, one) for one in schema["enum"]):
            return False
        if "const" in schema and not _same(value, schema["const"]):
            return False
        if not self._fits_combined(schema, value, depth + 1):
            return False
        if isinstance(value, dict):
            return self._fits_object(schema, value, depth + 1)
        if isinstance(value, list):
            return self._fits_array(schema, value, depth + 1)
        if isinstance(value, str):
            least, most = schema.get("minLength", 0), schema.get("maxLength", math.inf)
            return least <= len(value) <= most and (
                "pattern" not in schema or bool(re.search(schema["pattern"], value))
            )
        return _fits_number(schema, value) if _is_type("number", value) else True

    def _fits_combined(self, schema: Mapping[str, Any], value: Any, depth: int) -> bool:
        for key, enough in (("allOf", all), ("anyOf", any)):
            if key in schema and not enough(self._fits(one, value, depth) for one in schema[key]):
                return False
        if "oneOf" in schema and sum(self._fits(one, value, depth) for one in schema["oneOf"]) != 1:
            return False
        if "not" in schema and self._fits(schema["not"], value, depth):
            return False
        if "if" in schema:
            then = "then" if self._fits(schema["if"], value, depth) else "else"
            return self._fits(schema.get(then, True), value, depth)
        return True

    def _fits_object(self, schema: Mapping[str, Any], value: dict[str, Any], depth: int) -> bool:
        properties, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
        if any(name not in value for name in schema.get("required", ())):
            return False
        if not schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", math.inf):
            return False
        for name, others in schema.get("dependentRequired", {}).items():
            if name in value and any(other not in value for other in others):
                return False
        for name, inner in value.items():
            matched = [one for pattern, one in patterns.items() if re.search(pattern, name)]
            if name in properties:
                matched.append(properties[name])
            for one in matched or [schema.get("additionalProperties", True)]:
                if not self._fits(one, inner, depth):
                    return False
            if not self._fits(schema.get("propertyNames", True), name, depth):
                return False
        return True

    def _fits_array(self, schema: Mapping[str, Any], value: list[Any], depth: int) -> bool:
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf):
            return False
        if schema.get("uniqueItems") and any(_same(a, b) for at, a in enumerate(value) for b in value[:at]):
            return False
        first = schema.get("prefixItems", [])
        pairs = [*zip(first, value, strict=False), *((schema.get("items", True), one) for one in value[len(first) :])]
        if not all(self._fits(one, inner, depth) for one, inner in pairs):
            return False
        return "contains" not in schema or any(self._fits(schema["contains"], one, depth) for one in value)


def _is_type(kinds: Any, value: Any) -> bool:
    if isinstance(kinds, list):
        return any(_is_type(kind, value) for kind in kinds)
    if kinds in ("number", "integer"):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (kinds == "number" or float(value).is_integer())
    return isinstance(value, _TYPES[kinds])


def _same(a: Any, b: Any) -> bool:
    """JSON's equality: true is not 1."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a == b)


def _fits_number(schema: Mapping[str, Any], value: float) -> bool:
    if not schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf):
        return False
    if not schema.get("exclusiveMinimum", -math.inf) < value < schema.get("exclusiveMaximum", math.inf):
        return False
    if "multipleOf" in schema:
        ratio = value / schema["multipleOf"]
        return abs(ratio - round(ratio)) < 1e-9 * max(1.0, abs(ratio))
    return True
