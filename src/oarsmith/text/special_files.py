"""Special tokens and flags of a tokenizer directory, read as transformers 4.57 reads them.

Sources, later ones filling what earlier ones leave out: tokenizer_config.json; without `added_tokens_decoder` there,
also special_tokens_map.json, added_tokens.json and the added tokens of tokenizer.json; last the defaults of the
tokenizer class. A key that is present with null means "none", not "default".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from oarsmith.errors import CheckpointError
from oarsmith.text.special import NAMES, ClassRule, SpecialTokens, Token

_WHERE = "tokenizer_config.json"
_MAX_ID = 100_000_000


def read_special_tokens(
    config: Mapping[str, Any],
    special_map: Mapping[str, Any],
    added_file: Mapping[str, Any],
    json_tokens: Any,
    rule: ClassRule,
) -> SpecialTokens:
    """Put the sources together; see the file's docstring.

    Args:
        config: tokenizer_config.json.
        special_map: special_tokens_map.json ({} when absent).
        added_file: added_tokens.json, text to id ({} when absent).
        json_tokens: `added_tokens` of tokenizer.json ([] when absent).
        rule: of the tokenizer class.

    Raises:
        CheckpointError: one of them holds something else where a token, a list or an id must stand.
    """
    decoder = config.get("added_tokens_decoder")
    has_decoder = "added_tokens_decoder" in config
    values: dict[str, Any] = dict(config) if has_decoder else {**config, **special_map}
    extra = values.get("extra_special_tokens") or {}
    candidates = {name: values.get(name, rule.defaults.get(name)) for name in NAMES}
    candidates |= extra if isinstance(extra, Mapping) else {}
    named = {
        name: parse_token(value, where=f"{_WHERE}, {name}", special=True)
        for name, value in candidates.items()
        if value not in (None, "")
    }
    listed = [*_listed(values, "additional_special_tokens"), *(extra if isinstance(extra, list) else [])]
    if not has_decoder:
        listed = [*_listed(config, "additional_special_tokens"), *listed]
    additional: dict[str, Token] = {}
    for value in (*listed, *rule.additional):
        token = parse_token(value, where=f"{_WHERE}, additional_special_tokens", special=True)
        additional.setdefault(token.content, token)
    if has_decoder:
        added = _decoded(decoder or {})
    else:
        names = {token.content for token in (*named.values(), *additional.values())}
        added = _added(added_file, json_tokens, names)
    by_content = {token.content: token for token in added.values()}
    named = {name: by_content.get(token.content, token) for name, token in named.items()}
    return SpecialTokens(named=named, additional=tuple(additional.values()), added=added)


def parse_token(value: Any, *, where: str, special: bool | None = None) -> Token:
    """A token from JSON: a string, or an object with `content` and flags."""
    content = value.get("content") if isinstance(value, Mapping) else value
    if not isinstance(content, str) or not _is_unicode(content):
        raise CheckpointError(f"{value!r} is not a token", where=where, fix='write "<s>" or {"content": "<s>", ...}')
    if not isinstance(value, Mapping):
        return Token(content)
    normalized = value.get("normalized")
    return Token(
        content=content,
        lstrip=bool(value.get("lstrip", False)),
        rstrip=bool(value.get("rstrip", False)),
        single_word=bool(value.get("single_word", False)),
        normalized=None if normalized is None else bool(normalized),
        special=bool(value.get("special", False)) if special is None else special,
        bare=False,
    )


def _listed(values: Mapping[str, Any], key: str) -> Sequence[Any]:
    value = values.get(key)
    if value is not None and not isinstance(value, list):
        raise CheckpointError(f"{value!r} is not a list of tokens", where=f"{_WHERE}, {key}", fix='write ["<x>", ...]')
    return value or []


def _decoded(decoder: Any) -> dict[int, Token]:
    where = f"{_WHERE}, added_tokens_decoder"
    if not isinstance(decoder, Mapping):
        raise CheckpointError(f"{decoder!r} is not an object", where=where, fix='write {"0": {"content": "<s>"}, ...}')
    return {_id(index, where): parse_token(value, where=f"{where} {index}") for index, value in decoder.items()}


def _added(added_file: Mapping[str, Any], json_tokens: Any, names: set[str]) -> dict[int, Token]:
    added = {
        _id(index, f"added_tokens.json, {text!r}"): Token(
            parse_token(text, where="added_tokens.json").content,
            normalized=text not in names,
            special=text in names,
            bare=False,
        )
        for text, index in added_file.items()
    }
    where = "tokenizer.json, added_tokens"
    if not isinstance(json_tokens, list):
        raise CheckpointError(f"{json_tokens!r} is not a list of tokens", where=where)
    for entry in json_tokens:
        if not isinstance(entry, Mapping) or "id" not in entry:
            raise CheckpointError(f"{entry!r} is not an added token", where=where)
        added[_id(entry["id"], where)] = parse_token(entry, where=where)
    return added


def _id(value: Any, where: str) -> int:
    """A token id: a number, as a number or as JSON keys spell it."""
    text = str(value)
    if isinstance(value, bool) or not text.isascii() or not text.isdigit() or int(text[:12]) > _MAX_ID:
        raise CheckpointError(f"{value!r} is not a token id", where=where, fix=f"write a number from 0 to {_MAX_ID:,}")
    return int(text)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)
