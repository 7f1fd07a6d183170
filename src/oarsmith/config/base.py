"""What every job configuration shares, and the value types its keys are made of.

Values arrive as JSON or YAML values and as command-line words, so each type accepts the spellings people use
(``"1e-5"``, ``"true"``, ``1``/``0`` for a switch as PaddleNLP files write it, ``3.0`` for a count) and nothing else:
a string that is not a number stays an error, a fraction is never cut to a whole number.
"""

from __future__ import annotations

import json
import re
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict

TRUE_WORDS = frozenset({"true", "yes", "on", "1"})
FALSE_WORDS = frozenset({"false", "no", "off", "0"})


def _to_bool(value: object) -> object:
    if isinstance(value, str):
        word = value.strip().lower()
        if word in TRUE_WORDS:
            return True
        if word in FALSE_WORDS:
            return False
        raise ValueError("must be true or false")
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    return value


def _to_int(value: object) -> object:
    if isinstance(value, str):
        try:
            return int(value.replace("_", ""))
        except ValueError:
            value = _to_float(value)
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError("must be a whole number")
        return int(value)
    return value


def _to_float(value: object) -> object:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ValueError("must be a number") from None
    return value


def _to_strings(value: object) -> object:
    """A list from JSON or YAML, or one word from the command line (a JSON list when it starts with a bracket)."""
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"must be a JSON list of texts ({error})") from None
        else:
            value = [value]
    return tuple(value) if isinstance(value, list) else value


def _to_names(value: object) -> object:
    """Names separated by commas become a list; one text stays a text (a name, all-linear, a pattern)."""
    if isinstance(value, str) and not value.lstrip().startswith("["):
        parts = [part.strip() for part in value.split(",")]
        return tuple(parts) if len(parts) > 1 and all(re.fullmatch(r"[\w.-]+", part) for part in parts) else value
    return _to_strings(value)


def _to_words(value: object) -> object:
    """Words separated by commas, or a list; ``none`` and nothing are the empty list."""
    if isinstance(value, str) and not value.lstrip().startswith("["):
        value = [part.strip() for part in value.split(",")]
    words = _to_strings(value)
    return tuple(word for word in words if word not in ("", "none")) if isinstance(words, tuple) else words


def _to_ints(value: object) -> object:
    """Whole numbers separated by commas, or a list."""
    words = _to_words([value] if isinstance(value, int) and not isinstance(value, bool) else value)
    return tuple(_to_int(word) for word in words) if isinstance(words, tuple) else words


def _to_floats(value: object) -> object:
    """Numbers separated by commas, or a list."""
    words = _to_words([value] if isinstance(value, (int, float)) and not isinstance(value, bool) else value)
    return tuple(float(str(word)) for word in words) if isinstance(words, tuple) else words


def _to_object(value: object) -> object:
    """A mapping, or the JSON text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"must be a JSON object ({error})") from None
        if not isinstance(value, dict):
            raise ValueError("must be a JSON object")
    return value


def _to_biases(value: object) -> object:
    """Numbers by token id: JSON has ids as text."""
    found = _to_object(value)
    if not isinstance(found, dict):
        return found
    return {_to_int(index): _to_float(number) for index, number in found.items()}


def rewards_of(value: object) -> object:
    """One reward or a list of them; text that begins like JSON is JSON."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"must be JSON ({error})") from None
    if isinstance(value, (str, dict)):
        value = [value]
    return tuple(value) if isinstance(value, list) else value


Bool = Annotated[bool, BeforeValidator(_to_bool)]
Int = Annotated[int, BeforeValidator(_to_int)]
Float = Annotated[float, BeforeValidator(_to_float)]
Strings = Annotated[tuple[str, ...], BeforeValidator(_to_strings)]
Words = Annotated[tuple[str, ...], BeforeValidator(_to_words)]
Floats = Annotated[tuple[float, ...], BeforeValidator(_to_floats)]
Ints = Annotated[tuple[int, ...], BeforeValidator(_to_ints)]
Biases = Annotated[dict[int, float], BeforeValidator(_to_biases)]
Patterns = Annotated[dict[str, str], BeforeValidator(_to_object)]
Trackers = Annotated[tuple[Literal["tensorboard", "wandb", "mlflow"], ...], BeforeValidator(_to_words)]
NamesOrPattern = Annotated[tuple[str, ...] | str, BeforeValidator(_to_names)]


class JobConfig(BaseModel):
    """The values of one job. Frozen and strict: an unknown key or a value of another type is an error.

    A job class combines *groups*, each a plain subclass of this one with a ``title``. Class variables:

    * ``command``: the command that uses it.
    * ``positional``: keys that the command line accepts without their name, in this order.
    * ``several``: keys that on the command line take all words up to the next key.
    * ``also_accepts``: jobs whose files can be given unchanged; their further keys are listed as having no effect.
    """

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )

    title: ClassVar[str] = "Keys"
    command: ClassVar[str] = ""
    positional: ClassVar[tuple[str, ...]] = ()
    several: ClassVar[tuple[str, ...]] = ()
    also_accepts: ClassVar[tuple[str, ...]] = ()


def groups_of(config_class: type[JobConfig]) -> dict[str, list[str]]:
    """The keys under the title of the class that defined them first, in the order of definition.

    A job may give a shared key another default; the key stays in its group.
    """
    owners = [owner for owner in config_class.__mro__ if issubclass(owner, JobConfig)]
    first = {key: owner for owner in owners for key in vars(owner).get("__annotations__", {})}
    groups: dict[str, list[str]] = {}
    for owner in owners:
        own = [key for key in config_class.model_fields if first[key] is owner]
        if own:  # several classes may share a title
            groups.setdefault(owner.title, []).extend(own)
    return groups


def value_types(config_class: type[JobConfig], key: str) -> set[type]:
    """The Python types a key's values have, without None: ``{bool}`` for a switch, ``{tuple, str}`` for names."""
    return _flat(config_class.model_fields[key].annotation) - {NoneType}


def value_choices(config_class: type[JobConfig], key: str) -> tuple[str, ...]:
    """The words a key accepts, where it accepts only certain ones; else empty."""
    return _choices(config_class.model_fields[key].annotation)


def _flat(annotation: Any) -> set[type]:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _flat(inner[0])
    if origin in (Union, UnionType):
        return set().union(*(_flat(part) for part in inner))
    if origin is Literal:
        return {type(word) for word in inner}
    return {origin or annotation}


def _choices(annotation: Any) -> tuple[str, ...]:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return tuple(word for part in inner for word in _choices(part))
    return inner if origin is Literal else ()
