"""``oarsmith explain``: what a configuration key is, the value it has, where that came from, and the rule."""

from __future__ import annotations

from pathlib import Path

from oarsmith.config.base import JobConfig, groups_of
from oarsmith.config.derive import rule_for
from oarsmith.config.entries import read_file
from oarsmith.config.help import default_of, kind_of, shown
from oarsmith.config.load import load_config
from oarsmith.config.names import aliases_of, canonical_key, nearest
from oarsmith.config.paddle import NOT_BUILT, WITHOUT_EFFECT
from oarsmith.config.registry import CONFIG_CLASSES, config_class
from oarsmith.config.resolved import RUN_FILE, Resolved
from oarsmith.config.switches import SWITCHES
from oarsmith.config.tools import ExplainConfig
from oarsmith.errors import ConfigError


def run(resolved: Resolved[ExplainConfig]) -> None:
    """Print one key, or all keys of the configuration.

    Raises:
        ConfigError: unknown key or job, or a configuration that could not run.
    """
    path, key = _file_and_key(resolved.config)
    keys_class = _class_of(resolved.config.job, path, key)
    loaded = load_config(keys_class, path) if path is not None else None
    if key is None:
        print(_table(keys_class, loaded))
    else:
        print(_one_key(keys_class, loaded, key))


def _file_and_key(config: ExplainConfig) -> tuple[Path | None, str | None]:
    """``explain learning_rate`` is a key without a file: one word that is no file is a key."""
    if config.config_file is None:
        return None, config.key
    path = Path(config.config_file)
    if config.key is None and not path.exists() and path.suffix == "":
        return None, config.config_file
    return (path / RUN_FILE if path.is_dir() else path), config.key


def _class_of(job: str | None, path: Path | None, key: str | None) -> type[JobConfig]:
    """The job's class: named, recorded by a saved run, or the one that has most of the given names."""
    if job is not None:
        if job not in CONFIG_CLASSES:
            raise ConfigError(f"there is no command '{job}'", where="job", fix=f"one of {', '.join(CONFIG_CLASSES)}")
        return config_class(job)
    names = {key} if key is not None else set()
    if path is not None:
        layer = read_file(path)
        if layer.meta.get("job") in CONFIG_CLASSES:
            return config_class(layer.meta["job"])
        names = {entry.name for entry in layer.entries}
    order = sorted(CONFIG_CLASSES, key=lambda name: name != "sft")
    return max((config_class(name) for name in order), key=lambda known: _num_known(known, names))


def _num_known(keys_class: type[JobConfig], names: set[str]) -> int:
    return sum(canonical_key(name, keys_class.model_fields) in keys_class.model_fields for name in names)


def _one_key(keys_class: type[JobConfig], loaded: Resolved[JobConfig] | None, name: str) -> str:
    key = canonical_key(name, keys_class.model_fields)
    if key not in keys_class.model_fields:
        return _not_a_key(keys_class, name)
    lines = [key if loaded is None else f"{key} = {shown(dict(loaded.config)[key])}"]
    if loaded is not None:
        lines.append(f"  from:     {loaded.provenance[key]}")
        if key in loaded.without_effect:
            lines.append(f"  effect:   none: {loaded.without_effect[key]}")
    lines.append(f"  what:     {keys_class.model_fields[key].description}")
    lines.append(f"  values:   {kind_of(keys_class, key)}")
    lines.append(f"  default:  {default_of(keys_class, key)}")
    rule = rule_for(keys_class, key)
    if rule is not None:
        lines.append(f"  rule:     where not given, {rule.reason}")
    others = aliases_of(key, keys_class.model_fields)
    if others:
        lines.append(f"  also:     {', '.join(others)}")
    lines.append(f"  command:  oarsmith {keys_class.command}")
    return "\n".join(lines)


def _not_a_key(keys_class: type[JobConfig], name: str) -> str:
    if name in WITHOUT_EFFECT:
        return f"{name}\n  accepted, without effect: {WITHOUT_EFFECT[name]}"
    if name in NOT_BUILT:
        return f"{name}\n  not built yet in this version: {NOT_BUILT[name].what}. To go on: {NOT_BUILT[name].fix}"
    if name in SWITCHES:
        return f"{name}\n  a switch that sets another key: bf16 and fp16 set dtype, no_cuda sets device, and so on"
    guess = nearest(name, keys_class.model_fields)
    raise ConfigError(
        f"'oarsmith {keys_class.command}' has no key '{name}'",
        fix=f"did you mean '{guess}'?" if guess else f"'oarsmith {keys_class.command} --help' lists the keys",
    )


def _table(keys_class: type[JobConfig], loaded: Resolved[JobConfig] | None) -> str:
    if loaded is None:
        raise ConfigError("say what to explain", fix="oarsmith explain CONFIG [KEY], or oarsmith explain KEY")
    values = {key: shown(value) for key, value in loaded.config}
    key_width = max(map(len, values))
    value_width = min(32, max(map(len, values.values())))
    lines = [f"oarsmith {keys_class.command}"]
    for title, keys in groups_of(keys_class).items():
        lines += ["", f"{title}:"]
        lines += [f"  {key:<{key_width}}  {values[key]:<{value_width}}  {loaded.provenance[key]}" for key in keys]
    if loaded.without_effect:
        lines += ["", "Given, without effect:"]
        lines += [f"  {name:<{key_width}}  {reason}" for name, reason in loaded.without_effect.items()]
    return "\n".join(lines)
