"""From a file and command-line words to one frozen configuration. Nothing heavy is imported on the way."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from oarsmith.errors import ConfigError

from .base import JobConfig, groups_of, value_choices
from .combinations import check_combinations
from .derive import derive
from .entries import COMMAND_LINE, Entry, FileLayer, read_file
from .idle import idle_keys
from .names import ALIASES, canonical_key, canonical_value, nearest
from .overrides import parse_overrides
from .paddle import NOT_BUILT, WITHOUT_EFFECT, refusal
from .registry import config_class as class_of
from .resolved import RUN_FILE, Resolved, is_given
from .switches import SWITCHES, resolve_switches

C = TypeVar("C", bound=JobConfig)
# Commands whose files are easily taken for one another.
_TRAINING = ("dpo", "kto", "reward", "grpo", "ppo", "sft", "pretrain")


def load_config(
    config_class: type[C], path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()
) -> Resolved[C]:
    """Read a job's configuration.

    Args:
        config_class: what the job takes.
        path: a JSON or YAML file, a run folder (its resolved configuration), or None.
        overrides: command-line words; they win over the file.

    Raises:
        ConfigError: unknown key (names the nearest one), value of the wrong kind or out of range, missing key, feature
            that is not built yet, impossible combination. Always with the place and what to do.
    """
    file = read_file(_config_file(Path(path))) if path is not None else FileLayer((), {})
    _check_job(config_class, file, path)
    notes: list[str] = []
    given = _merge(config_class, [*file.entries, *parse_overrides(config_class, overrides)], notes)
    given = resolve_switches(given, config_class.model_fields)
    given, without_effect = _set_aside(config_class, given)
    entries = {key: entry for key, entry in given.items() if entry.value is not None}
    config, reasons = derive(_validate(config_class, entries))
    check_combinations(config, where=None if path is None else str(path))
    provenance = _provenance(config, entries, reasons, file.meta)
    return Resolved(config, provenance, without_effect | idle_keys(config, provenance), tuple(notes))


def overlay(resolved: Resolved[C], values: Mapping[str, object], where: str) -> C:
    """The configuration with more values, as if they had been given too: what follows from others is derived anew.

    Raises:
        ConfigError: as `load_config`; with ``where``.
    """
    origins, before = resolved.provenance, dict(resolved.config)
    entries = [Entry(key, before[key], origin, 0) for key, origin in origins.items() if is_given(origin)]
    entries += [Entry(name, value, where, 1) for name, value in values.items()]
    merged, _ = _set_aside(type(resolved.config), _merge(type(resolved.config), entries, []))
    config, _ = derive(
        _validate(type(resolved.config), {key: entry for key, entry in merged.items() if entry.value is not None})
    )
    check_combinations(config, where=where)
    return config


def check_keys(config_class: type[JobConfig], overrides: Sequence[str]) -> None:
    """Check that command-line words name keys of this job, without looking at the values (documentation has dummies).

    Raises:
        ConfigError: an unknown key or a word in the wrong place.
    """
    given = _merge(config_class, parse_overrides(config_class, overrides), [])
    for switch in SWITCHES:
        given.pop(switch, None)
    _set_aside(config_class, given)


def _config_file(path: Path) -> Path:
    return path / RUN_FILE if path.is_dir() else path


def _check_job(config_class: type[JobConfig], file: FileLayer, path: object) -> None:
    saved_for = file.meta.get("job", config_class.command)
    if saved_for != config_class.command and saved_for not in config_class.also_accepts:
        raise ConfigError(
            f"this file was saved by 'oarsmith {saved_for}', not by 'oarsmith {config_class.command}'",
            where=str(path),
            fix=f"oarsmith {saved_for} {path}",
        )


def _merge(config_class: type[JobConfig], entries: list[Entry], notes: list[str]) -> dict[str, Entry]:
    """One entry a key under our names; a higher layer replaces a lower one."""
    merged: dict[str, Entry] = {}
    for entry in entries:
        key = canonical_key(entry.name, config_class.model_fields)
        value, note = canonical_value(key, entry.value)
        if note:
            notes.append(note)
        before = merged.get(key)
        if before is not None and before.rank == entry.rank and before.value != value:
            raise ConfigError(
                f"'{before.name}' and '{entry.name}' are the same key with different values "
                f"({before.value!r} and {value!r})",
                where=entry.where,
                fix="keep one of them",
            )
        merged[key] = replace(entry, value=value)
    return merged


def _set_aside(config_class: type[JobConfig], given: dict[str, Entry]) -> tuple[dict[str, Entry], dict[str, str]]:
    """Take out the keys without a meaning here; refuse those not built and those nobody knows."""
    known = config_class.model_fields
    foreign = {key: job for job in config_class.also_accepts for key in class_of(job).model_fields}
    kept: dict[str, Entry] = {}
    without_effect: dict[str, str] = {}
    for key, entry in given.items():
        if key in known:
            kept[key] = entry
        elif key in foreign or key in SWITCHES:
            without_effect[key] = f"a key of oarsmith {foreign.get(key, 'sft')}"
        elif key in WITHOUT_EFFECT:
            without_effect[entry.name] = WITHOUT_EFFECT[key]
        elif key in NOT_BUILT:
            _refuse_unless_neutral(key, entry)
        else:
            raise _unknown_key(config_class, entry)
    return kept, without_effect


def _refuse_unless_neutral(key: str, entry: Entry) -> None:
    entry_refused = refusal(key, entry.value)
    if entry_refused is not None:
        raise ConfigError(
            f"{key} = {entry.value!r}: {entry_refused.what} is not built yet in this version",
            where=entry.where,
            fix=entry_refused.fix,
        )


def _unknown_key(config_class: type[JobConfig], entry: Entry) -> ConfigError:
    owners = [job for job in _TRAINING if entry.name in class_of(job).model_fields]
    if owners and config_class.command in _TRAINING:
        return ConfigError(
            f"the key '{entry.name}' belongs to 'oarsmith {owners[0]}'",
            where=entry.where,
            fix=f"remove it; 'oarsmith {config_class.command} --help' lists the keys of this command",
        )
    candidates = [*config_class.model_fields, *ALIASES, *SWITCHES, *WITHOUT_EFFECT, *NOT_BUILT]
    guess = nearest(entry.name, config_class.model_fields) or nearest(entry.name, candidates)
    return ConfigError(
        f"unknown key '{entry.name}'",
        where=entry.where,
        fix=f"did you mean '{guess}'?" if guess else f"'oarsmith {config_class.command} --help' lists the keys",
    )


def _validate(config_class: type[C], entries: Mapping[str, Entry]) -> C:
    try:
        return config_class.model_validate({key: entry.value for key, entry in entries.items()})
    except ValidationError as error:
        raise _as_config_error(config_class, entries, error) from None


def _as_config_error(
    config_class: type[JobConfig], entries: Mapping[str, Entry], error: ValidationError
) -> ConfigError:
    absent = {str(one["loc"][0]) for one in error.errors() if one["type"] == "missing"}
    missing = [key for keys in groups_of(config_class).values() for key in keys if key in absent]
    if missing:
        usage = " ".join(f"--{key} ..." for key in missing)
        return ConfigError(
            f"'{missing[0]}' is required: {config_class.model_fields[missing[0]].description}",
            fix=f"add it to the configuration, or on the command line: {usage}",
        )
    first = error.errors()[0]
    key = str(first["loc"][0])
    entry = entries[key]
    choices = value_choices(config_class, key)
    if choices:
        guess = nearest(str(entry.value), choices)
        return ConfigError(
            f"{key} = {entry.value!r}: must be {' or '.join(choices)}",
            where=entry.where,
            fix=f"did you mean '{guess}'?" if guess else "give one of these",
        )
    reason = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return ConfigError(
        f"{key} = {entry.value!r}: {reason}", where=entry.where, fix=config_class.model_fields[key].description
    )


def _provenance(
    config: JobConfig, entries: Mapping[str, Entry], reasons: Mapping[str, str], meta: Mapping[str, Any]
) -> dict[str, str]:
    """Where every value came from; a replayed run also says where it came from the first time."""
    earlier: Mapping[str, str] = meta.get("provenance", {})
    result: dict[str, str] = {}
    for key in type(config).model_fields:
        entry = entries.get(key)
        if entry is None:
            result[key] = f"derived ({reasons[key]})" if key in reasons else "default"
            continue
        origin = entry.where if entry.name == key else f"{entry.where} (as {entry.name})"
        replayed = entry.where != COMMAND_LINE and key in earlier
        result[key] = f"{origin}, saved from: {earlier[key]}" if replayed else origin
    return result
