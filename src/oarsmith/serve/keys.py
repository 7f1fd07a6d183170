"""API keys: a file of names, hashes and limits. A key itself is shown once, when it is made, and kept nowhere."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
from pathlib import Path
from typing import Any

import yaml

from oarsmith.errors import ConfigError
from oarsmith.serve.callers import Call, Caller, LimitError, current_call
from oarsmith.serve.errors import ApiError, from_oarsmith

_log = logging.getLogger(__name__)
_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrency")
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,100}")
_EXAMPLE = "NAME sha256:... [requests_per_minute=60] [tokens_per_minute=100000] [concurrency=8]"


def new_key(name: str) -> tuple[str, str]:
    """A new key, and the line of it for the file.

    Raises:
        ConfigError: a name that the file could not hold.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name a key", where="new_api_key", fix="use letters, digits and . _ @ -")
    # 256 random bits: nobody finds them from a fast hash, so a slow one would only cost time with every request.
    key = "sk-" + secrets.token_urlsafe(32)
    return key, f"{name} sha256:{_digest(key)}"


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class Keys:
    """Who may ask. The file is read again by ``reload``.

    Args:
        path: lines ``NAME sha256:HEX [limit=number ...]``, or the same as a list of mappings in YAML or JSON
            (name, hash, requests_per_minute, tokens_per_minute, concurrency).

    Raises:
        ConfigError: the file cannot be read or understood.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._holders = _read(self._path)

    def __len__(self) -> int:
        return len(self._holders)

    def reload(self) -> None:
        """Read the file again; where it is wrong the old keys stay. Holders keep what they have used."""
        try:
            found = _read(self._path)
        except ConfigError as error:
            _log.error("the keys stay as they were: %s", error.what)
            return
        before = {caller.name: caller for _, caller in self._holders}
        for _, caller in found:
            if caller.name in before:
                caller.inherit(before[caller.name])
        self._holders = found
        _log.info("%d keys read", len(found))

    def holder(self, token: str | None) -> Caller:
        """Whose key it is.

        Raises:
            ApiError: nobody's.
        """
        challenge = {"WWW-Authenticate": 'Bearer realm="oarsmith"'}
        if not token:
            message = "no API key; send it as Authorization: Bearer KEY"
            raise ApiError(401, message, "authentication_error", code="missing_api_key", headers=challenge)
        digest, found = _digest(token), None
        # All are compared, and each in constant time: how long it takes says nothing about the keys.
        for known, caller in self._holders:
            if hmac.compare_digest(known, digest):
                found = caller
        if found is None:
            message = "the API key is not one of this server's"
            raise ApiError(401, message, "authentication_error", code="invalid_api_key", headers=challenge)
        return found

    def check(self, token: str | None) -> Caller:
        """Count a request of the key's holder; what the running task asks from now on is theirs.

        Raises:
            ApiError: no key, or its rate is used up.
        """
        caller = self.holder(token)
        try:
            caller.ask()
        except LimitError as error:
            raise from_oarsmith(error) from error
        call = current_call.get()
        if call is None:
            current_call.set(Call("", caller))
        else:
            call.caller = caller
        return caller


def _read(path: Path) -> list[tuple[str, Caller]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigError(f"{path} cannot be read: {why}", where="api_keys", fix="name a file of keys") from error
    rows = _list(text, path) if path.suffix.lower() in (".json", ".yaml", ".yml") else _lines(text, path)
    found = [_holder(row, where) for where, row in rows]
    names = [caller.name for _, caller in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two keys are named {name!r}", where=str(path), fix="rename one")
    if not found:
        raise ConfigError(
            f"{path} has no keys", where="api_keys", fix="make one with: oarsmith serve --new_api_key NAME"
        )
    return found


def _lines(text: str, path: Path) -> list[tuple[str, dict[str, Any]]]:
    rows: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split("#")[0].split()
        if not words:
            continue
        row: dict[str, Any] = {"name": words[0], "hash": words[1] if len(words) > 1 else ""}
        for word in words[2:]:
            name, _, value = word.partition("=")
            row[name] = int(value) if value.isascii() and value.isdigit() else value
        rows.append((f"{path}:{number}", row))
    return rows


def _list(text: str, path: Path) -> list[tuple[str, dict[str, Any]]]:
    try:
        found = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError("this is no valid JSON or YAML", where=str(path), fix="correct it") from error
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ConfigError("keys are a list of mappings", where=str(path), fix="write - {name: ..., hash: sha256:...}")
    return [(f"{path}, key {number}", row) for number, row in enumerate(found, start=1)]


def _holder(row: dict[str, Any], where: str) -> tuple[str, Caller]:
    unknown = set(row) - {"name", "hash", *_LIMITS}
    name, match = row.get("name"), _HASH.fullmatch(str(row.get("hash", "")).lower())
    if not isinstance(name, str) or not _NAME.fullmatch(name) or unknown:
        raise ConfigError("this is no key", where=where, fix=f"write {_EXAMPLE}")
    if match is None:
        # What stands there may be a key by mistake, so it is not repeated.
        raise ConfigError(f"{name} has no hash of a key", where=where, fix=f"write {_EXAMPLE}")
    limits = {limit: row[limit] for limit in _LIMITS if row.get(limit) is not None}
    for limit, value in limits.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{limit} must be a whole number above 0", where=where, fix=f"write {_EXAMPLE}")
    return match.group(1), Caller(name, **limits)
