"""Command-line words to keys and values: ``--key value``, ``--key=value``, a bare ``--flag`` for true."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from oarsmith.errors import ConfigError

from .base import FALSE_WORDS, TRUE_WORDS, JobConfig, value_types
from .entries import COMMAND_LINE, Entry
from .names import canonical_key, nearest
from .switches import SWITCHES, WITH_WORD


def parse_overrides(config_class: type[JobConfig], words: Sequence[str], rank: int = 1) -> list[Entry]:
    """The entries that command-line words stand for.

    A switch takes the next word only if that word says true or false, so ``--lora data.jsonl`` keeps its file. Words
    without a key fill ``config_class.positional`` in order. A key given twice makes a list where the key takes one;
    otherwise it is an error.

    Raises:
        ConfigError: a word that belongs to no key, a key without its value, a key given twice.
    """
    keys = config_class.model_fields
    switches = {key for key in keys if value_types(config_class, key) == {bool}} | (SWITCHES - WITH_WORD)
    found: list[Entry] = []
    free: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not word.startswith("--") or word == "--":
            free.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        if not equals:
            following = words[position] if position < len(words) else None
            key = canonical_key(name, keys)
            if _takes(key, following, switches):
                assert following is not None
                value = following
                position += 1
                while key in config_class.several and position < len(words) and not words[position].startswith("--"):
                    found.append(Entry(name, value, COMMAND_LINE, rank))
                    value = words[position]
                    position += 1
            elif key in keys and key not in switches:
                raise ConfigError(f"--{name} needs a value", where=COMMAND_LINE, fix=f"write --{name} VALUE")
            else:
                value = "true"
        found.append(Entry(name, None if value == "null" else value, COMMAND_LINE, rank))
    return _join_repeated(config_class, _positional(config_class, free, rank) + found)


def _takes(key: str, following: str | None, switches: Collection[str]) -> bool:
    if following is None or following.startswith("--"):
        return False
    return key not in switches or following.lower() in TRUE_WORDS | FALSE_WORDS | {"null", "none"}


def _positional(config_class: type[JobConfig], free: list[str], rank: int) -> list[Entry]:
    names = config_class.positional
    if len(free) > len(names):
        word = free[len(names)]
        guess = nearest(word.lstrip("-"), config_class.model_fields)
        meant = f"--{guess}" if guess else "--key value"
        expected = " ".join(name.upper() for name in names) or "no words without a key"
        raise ConfigError(
            f"cannot place '{word}'",
            where=COMMAND_LINE,
            fix=f"oarsmith {config_class.command} takes {expected}; everything else is given as {meant}",
        )
    return [Entry(name, word, COMMAND_LINE, rank) for name, word in zip(names, free, strict=False)]


def _join_repeated(config_class: type[JobConfig], entries: list[Entry]) -> list[Entry]:
    joined: dict[str, Entry] = {}
    for entry in entries:
        key = canonical_key(entry.name, config_class.model_fields)
        before = joined.get(key)
        if before is None:
            joined[key] = entry
            continue
        if key not in config_class.model_fields or tuple not in value_types(config_class, key):
            raise ConfigError(
                f"'{key}' is given twice: {before.value!r} and {entry.value!r}", where=COMMAND_LINE, fix="keep one"
            )
        earlier = before.value if isinstance(before.value, list) else [before.value]
        joined[key] = Entry(entry.name, [*earlier, entry.value], COMMAND_LINE, entry.rank)
    return list(joined.values())
