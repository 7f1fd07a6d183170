"""A merge as a recipe says it: mergekit's YAML, read strictly.

Source: https://github.com/arcee-ai/mergekit, docs/config_reference.md.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from oarsmith.errors import ConfigError
from oarsmith.merge.parameters import Settings, read_setting, settings_values


@dataclass(frozen=True)
class SourceSpec:
    """Layers [start, stop) of a model (None: all), with its own parameters."""

    model: str
    layers: tuple[int, int] | None = None
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class SliceSpec:
    """Some layers of the result, each merged from one layer of every source."""

    sources: tuple[SourceSpec, ...]
    base: str | None = None
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class TokenSpec:
    """Where the embedding of a token comes from.

    Attributes:
        source: a model; None: zeros.
        token: of that model, if it is another one; or its id.
        force: also for models that have the token.
    """

    source: str | None
    token: str | int | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerSpec:
    """Whose tokens the result has: ``union``, ``base`` or a model's path."""

    source: str
    tokens: Mapping[str, TokenSpec] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A merge.

    Attributes:
        slices: from the first layer to the last; ``models`` in a recipe is one slice of all layers.
        parameters: from the more special to the more general: of the module, of the recipe.
        sparsify: what is done to deltas before the method (not in mergekit).
    """

    method: str
    slices: tuple[SliceSpec, ...]
    base: str | None = None
    parameters: tuple[Settings, ...] = ()
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: TokenizerSpec | None = None
    chat_template: str | None = None
    sparsify: str = "none"

    @property
    def models(self) -> tuple[str, ...]:
        """Every model, in the order in which they are named; bases last."""
        found = [source.model for one in self.slices for source in one.sources]
        found += [one.base for one in self.slices if one.base is not None]
        found += [token.source for token in (self.tokenizer.tokens if self.tokenizer else {}).values() if token.source]
        if self.base is not None:
            found.append(self.base)
        return tuple(dict.fromkeys(found))


def read_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe from its keys, whose own names were checked before.

    Raises:
        ConfigError: an unknown key or a value that makes no sense, with its place.
    """
    given = [key for key in ("models", "slices", "modules") if values.get(key)]
    if len(given) != 1:
        raise ConfigError(
            f"a recipe has exactly one of models, slices and modules; this one has {' and '.join(given) or 'none'}",
            where="recipe",
            fix="name the models under models: - model: PATH",
        )
    if not values.get("merge_method"):
        raise ConfigError("a recipe says how to merge", where="merge_method", fix="e.g. merge_method: linear")
    module, where = values, given[0]
    settings: list[Settings] = []
    if where == "modules":
        module, where = _only_module(values["modules"])
        settings.append(_settings(module.get("parameters"), f"{where}.parameters"))
        where = f"{where}.{'slices' if module.get('slices') else 'models'}"
    settings.append(_settings(values.get("parameters"), "parameters"))
    if module.get("slices"):
        slices = tuple(_slice(one, f"{where}[{i}]") for i, one in enumerate(_list(module["slices"], where)))
    else:
        entries = _list(module["models"], where)
        slices = (SliceSpec(tuple(_source(one, f"{where}[{i}]", whole=True) for i, one in enumerate(entries))),)
    base = values.get("base_model")
    return Recipe(
        method=str(values["merge_method"]),
        slices=slices,
        base=None if base is None else model_name(base, "base_model"),
        parameters=tuple(settings),
        dtype=values.get("dtype"),
        out_dtype=values.get("out_dtype"),
        tokenizer=read_tokenizer(values),
        chat_template=values.get("chat_template"),
        sparsify=values.get("sparsify_type") or "none",
    )


def _only_module(modules: object) -> tuple[Mapping[str, Any], str]:
    if not isinstance(modules, dict) or len(modules) != 1:
        raise ConfigError(
            "a language model has one module",
            where="modules",
            fix="name models or slices directly; models of several modules are merged one module at a time",
        )
    (name,) = modules
    where = f"modules.{name}"
    found = _object(modules[name], where, ("models", "slices", "parameters"))
    if bool(found.get("models")) == bool(found.get("slices")):
        raise ConfigError("a module has models or slices", where=where, fix="give one of the two")
    return found, where


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ConfigError("must be a list with an entry for each", where=where, fix="write - model: PATH")
    return value


def _object(value: object, where: str, keys: Collection[str], needed: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{value!r} is no object", where=where, fix=f"its keys are {', '.join(keys)}")
    unknown = [key for key in value if key not in keys]
    if unknown:
        guess = difflib.get_close_matches(str(unknown[0]), keys, n=1)
        raise ConfigError(
            f"unknown key '{unknown[0]}'",
            where=where,
            fix=f"did you mean '{guess[0]}'?" if guess else f"its keys are {', '.join(keys)}",
        )
    missing = [key for key in needed if key not in value]
    if missing:
        raise ConfigError(f"'{missing[0]}' is missing", where=where, fix="add it")
    return value


def _settings(value: object, where: str) -> Settings:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{value!r} is no object", where=where, fix="write name: value")
    return {str(name): read_setting(one, f"{where}.{name}") for name, one in value.items()}


def _slice(value: object, where: str) -> SliceSpec:
    found = _object(value, where, ("sources", "base_model", "parameters", "residual_weight"), ("sources",))
    if found.get("residual_weight") is not None:
        raise ConfigError(
            "residual_weight changes nothing in mergekit, and is not built here", where=where, fix="remove it"
        )
    sources = _list(found["sources"], f"{where}.sources")
    base = found.get("base_model")
    return SliceSpec(
        tuple(_source(one, f"{where}.sources[{i}]", whole=False) for i, one in enumerate(sources)),
        None if base is None else model_name(base, f"{where}.base_model"),
        _settings(found.get("parameters"), f"{where}.parameters"),
    )


def _source(value: object, where: str, *, whole: bool) -> SourceSpec:
    keys = ("model", "parameters") if whole else ("model", "layer_range", "parameters")
    found = _object(value, where, keys, keys[:1] if whole else keys[:2])
    layers = None if whole else _range(found["layer_range"], f"{where}.layer_range")
    return SourceSpec(
        model_name(found["model"], f"{where}.model"), layers, _settings(found.get("parameters"), f"{where}.parameters")
    )


def _range(value: object, where: str) -> tuple[int, int]:
    whole = isinstance(value, list) and len(value) == 2 and all(type(one) is int for one in value)
    if not whole or not isinstance(value, list) or not 0 <= value[0] < value[1]:
        raise ConfigError(f"{value!r} is no range of layers", where=where, fix="write [0, 8]: the first, and one after")
    return value[0], value[1]


def model_name(value: object, where: str) -> str:
    """A model as text: a path, or ``path+adapter``; mergekit also writes ``{model: {path: ...}, lora: {path: ...}}``.

    Raises:
        ConfigError: neither.
    """
    if isinstance(value, dict):
        found = _object(value, where, ("model", "lora"), ("model",))
        parts = [found["model"], *([found["lora"]] if found.get("lora") else [])]
        paths = [one["path"] if isinstance(one, dict) and "path" in one else one for one in parts]
        value = "+".join(map(str, paths))
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{value!r} is no path", where=where, fix="give the path of a model")
    return value


def read_tokenizer(values: Mapping[str, Any]) -> TokenizerSpec | None:
    """What a recipe's ``tokenizer`` or ``tokenizer_source`` says.

    Raises:
        ConfigError: both, or a value that makes no sense.
    """
    source, spec = values.get("tokenizer_source"), values.get("tokenizer")
    if source is not None and spec is not None:
        raise ConfigError("tokenizer and tokenizer_source say the same", where="tokenizer", fix="keep one of them")
    if source is not None:
        return TokenizerSpec(model_name(source, "tokenizer_source"))
    if spec is None:
        return None
    found = _object(spec, "tokenizer", ("source", "tokens", "pad_to_multiple_of"), ("source",))
    multiple = found.get("pad_to_multiple_of")
    if multiple is not None and (type(multiple) is not int or multiple < 1):
        raise ConfigError(
            f"{multiple!r} is no whole number from 1", where="tokenizer.pad_to_multiple_of", fix="correct it"
        )
    tokens = found.get("tokens") or {}
    if not isinstance(tokens, dict):
        raise ConfigError("must be an object of tokens", where="tokenizer.tokens", fix="write TOKEN: {source: MODEL}")
    return TokenizerSpec(
        model_name(found["source"], "tokenizer.source"),
        {str(token): _token(one, f"tokenizer.tokens.{token}") for token, one in tokens.items()},
        multiple,
    )


def _token(value: object, where: str) -> TokenSpec:
    found = _object(value, where, ("source", "force"), ("source",))
    source, force = found["source"], found.get("force", False)
    if not isinstance(force, bool):
        raise ConfigError(f"{force!r} is not true or false", where=f"{where}.force", fix="correct it")
    if not isinstance(source, dict) or "kind" not in source:
        return TokenSpec(model_name(source, f"{where}.source"), None, force)
    inner = _object(source, f"{where}.source", ("kind", "model", "token", "token_id"))
    if inner["kind"] == "zero":
        return TokenSpec(None, None, force)
    if inner["kind"] != "model_token" or "model" not in inner or ("token" in inner) == ("token_id" in inner):
        raise ConfigError(
            "a source is zero, or a model_token with a model and a token or a token_id",
            where=f"{where}.source",
            fix="write {kind: model_token, model: PATH, token: TEXT}",
        )
    token = inner["token_id"] if "token_id" in inner else str(inner["token"])
    return TokenSpec(model_name(inner["model"], f"{where}.source.model"), token, force)


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """A recipe as YAML has it, so that it can be given again."""
    values: dict[str, Any] = {"merge_method": recipe.method}
    one = recipe.slices[0]
    if len(recipe.slices) == 1 and not one.parameters and one.base is None and one.sources[0].layers is None:
        values["models"] = [_source_values(source) for source in one.sources]
    else:
        values["slices"] = [_slice_values(one) for one in recipe.slices]
    tokenizer = None
    if recipe.tokenizer is not None:
        tokens = {token: _token_values(spec) for token, spec in recipe.tokenizer.tokens.items()}
        multiple = recipe.tokenizer.pad_to_multiple_of
        tokenizer = _filled(source=recipe.tokenizer.source, tokens=tokens, pad_to_multiple_of=multiple)
    general: dict[str, Any] = {}
    for settings in reversed(recipe.parameters):
        general |= settings_values(settings)
    return values | _filled(
        base_model=recipe.base,
        parameters=general,
        sparsify_type=None if recipe.sparsify == "none" else recipe.sparsify,
        dtype=recipe.dtype,
        out_dtype=recipe.out_dtype,
        tokenizer=tokenizer,
        chat_template=recipe.chat_template,
    )


def _filled(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value not in (None, {}, ())}


def _source_values(source: SourceSpec) -> dict[str, Any]:
    layers = None if source.layers is None else list(source.layers)
    return _filled(model=source.model, layer_range=layers, parameters=settings_values(source.parameters))


def _slice_values(one: SliceSpec) -> dict[str, Any]:
    sources = [_source_values(source) for source in one.sources]
    return _filled(sources=sources, base_model=one.base, parameters=settings_values(one.parameters))


def _token_values(spec: TokenSpec) -> dict[str, Any]:
    source: Any = {"kind": "zero"} if spec.source is None else spec.source
    if spec.source is not None and spec.token is not None:
        key = "token_id" if isinstance(spec.token, int) else "token"
        source = {"kind": "model_token", "model": spec.source, key: spec.token}
    return {"source": source, "force": spec.force}
