"""``json``: the answer is JSON, has the keys that were asked for, and fits a schema."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from oarsmith.errors import ConfigError
from oarsmith.rl.completion import Completion
from oarsmith.rl.rewards.options import RewardOptions
from oarsmith.rl.rewards.values import RewardError, Value
from oarsmith.rl.rewards.verifiers.answers import MAX_CHARACTERS
from oarsmith.rl.rewards.verifiers.schema import Schema
from oarsmith.rl.rewards.verifiers.verifier import Verifier

_FENCE = re.compile(r"```(?:json|JSON)?\s*\n(.*?)```", re.DOTALL)
_NOTHING = object()


class JsonOptions(RewardOptions):
    """Options of ``json``."""

    keys: list[str] | None = Field(None, description="Keys that the object must have.")
    keys_column: str | None = Field(None, description="Column of the row with such a list, in place of `keys`.")
    json_schema: dict[str, Any] | None = Field(None, description="JSON schema that the value must fit.")
    schema_column: str | None = Field(None, description="Column of the row with a schema (an object or JSON text).")
    fenced: bool = Field(False, description="JSON in a ``` fence counts too, with text around it.")
    partial: bool = Field(
        True, description="Shares: one for JSON, one for each key, one for the schema. false: all of it or nothing."
    )
    value: float = Field(1.0, description="Value of an answer in which everything is right.")


class JsonReward(Verifier):
    """A value in [0, ``value``], with a share for each of what is asked.

    Raises:
        ConfigError: two sources of one thing, or a schema that cannot be checked.
    """

    def __init__(self, options: JsonOptions) -> None:
        super().__init__(options.name or "json")
        for one, two in (("keys", "keys_column"), ("json_schema", "schema_column")):
            given = options.model_dump(include={one, two}, exclude_none=True)
            if len(given) == 2:
                raise ConfigError(f"{one} and {two} are both given", where="reward 'json'", fix="give one of them")
        self._options = options
        self._schema = None if options.json_schema is None else Schema(options.json_schema)
        self._seen: dict[str, Schema] = {}

    def check(self, one: Completion, where: str) -> Value:
        options = self._options
        keys, schema = self._keys(one, where), self._schema_of(one, where)
        value = json_value(one.text, fenced=options.fenced)
        if value is _NOTHING:
            return 0.0
        parts = [True]
        if keys is not None:
            parts += [isinstance(value, dict) and key in value for key in keys]
        if schema is not None:
            parts.append(schema.fits(value))
        if not options.partial:
            return options.value * all(parts)
        return options.value * sum(parts) / len(parts)

    def _keys(self, one: Completion, where: str) -> list[str] | None:
        column = self._options.keys_column
        if column is None:
            return self._options.keys
        keys = one.row.get(column)
        if not isinstance(keys, list | tuple) or not all(isinstance(key, str) for key in keys):
            raise RewardError(f"reward '{self.name}': the column '{column}' holds no list of keys", where=where)
        return list(keys)

    def _schema_of(self, one: Completion, where: str) -> Schema | None:
        column = self._options.schema_column
        if column is None:
            return self._schema
        given = one.row.get(column)
        try:
            text = given if isinstance(given, str) else json.dumps(given, sort_keys=True)
            if text not in self._seen:
                found = json.loads(text)
                if not isinstance(found, Mapping):
                    raise ConfigError("it is no object")
                self._seen[text] = Schema(found)
            return self._seen[text]
        except (ValueError, TypeError, RecursionError) as error:
            what = f"reward '{self.name}': the column '{column}' holds no JSON schema ({error})"
            raise RewardError(what, where=where) from error


def json_value(text: str, *, fenced: bool) -> Any:
    """The value of an answer that is JSON (RFC 8259: no NaN, no key twice); `_NOTHING`: it is none."""
    if len(text) > MAX_CHARACTERS:
        return _NOTHING
    texts = [text.strip(), *(_FENCE.findall(text)[-1:] if fenced else [])]
    for one in texts:
        try:
            return json.loads(one, parse_constant=_refuse, object_pairs_hook=_once)
        except (ValueError, RecursionError):
            continue
    return _NOTHING


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found
