"""``oarsmith compare``: several methods of fine-tuning on the same data, one run each, one table and one picture.

Every run is a process of its own, so that its memory is its own, and a run folder of its own; those that are finished
are not run again.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from oarsmith.atomic import atomic_write_bytes, atomic_write_text
from oarsmith.config.adapters import AdapterKeys
from oarsmith.config.compare import FULL, CompareConfig
from oarsmith.config.load import load_config, overlay
from oarsmith.config.resolved import RUN_FILE, Resolved, is_given
from oarsmith.config.sft import SftConfig
from oarsmith.errors import ConfigError, OarsmithError
from oarsmith.jobs.compare_report import Outcome, draw, read_outcome, table
from oarsmith.jobs.console import make_console
from oarsmith.training.environment import describe_environment
from oarsmith.training.numbers import show_duration

_OWN = ("methods", "continue_on_error", "output_dir", "overwrite_output_dir", "lora", "adapter_type")
_SETTINGS = "settings.json"


@dataclass(frozen=True)
class Contestant:
    """One run: what the table calls it, its folder, and every key that it is given."""

    name: str
    folder: Path
    values: Mapping[str, Any]


def run(resolved: Resolved[CompareConfig]) -> int:
    """The command: 0 where every run ended well."""
    config, console = resolved.config, make_console()
    contestants = contestants_of(resolved)
    begun, outcomes, failed = time.monotonic(), list[Outcome](), list[str]()
    for number, contestant in enumerate(contestants):
        left = ""
        if number:
            each = (time.monotonic() - begun) / number
            left = f", about {show_duration(each * (len(contestants) - number))} left"
        console.print(f"{number + 1}/{len(contestants)} {contestant.name} -> {contestant.folder}{left}")
        error = _train(contestant, overwrite=config.overwrite_output_dir)
        if error is not None:
            if not config.continue_on_error:
                raise error
            failed.append(contestant.name)
            console.print(f"  failed: {error}", markup=False, soft_wrap=True)
            continue
        outcome = read_outcome(contestant.name, contestant.folder)
        outcomes.append(outcome)
        console.print(f"  {outcome.line()}", style="dim")
    if not outcomes:
        raise OarsmithError("no run ended well", where=config.output_dir, fix="see what each said in its output.txt")
    _report(config, outcomes, failed, console)
    return 1 if failed else 0


def contestants_of(resolved: Resolved[CompareConfig]) -> list[Contestant]:
    """The runs, each with its configuration checked before the first begins.

    Raises:
        ConfigError: a method that is not known, one that is named twice, or settings that cannot be.
    """
    config, found = resolved.config, list[Contestant]()
    dumped = config.model_dump(mode="json")
    shared = {key: dumped[key] for key, origin in resolved.provenance.items() if key not in _OWN and is_given(origin)}
    for text in config.methods:
        method, *settings = text.split(":")
        kind = "none" if method == FULL else method
        values = {key: value for key, value in shared.items() if _concerns(kind, key, value)}
        values["adapter_type"] = kind
        for setting in settings:
            key, equals, value = setting.partition("=")
            if not equals or key in _OWN:
                raise ConfigError(
                    f"{setting!r} is not KEY=VALUE of oarsmith sft", where="methods", fix="lora:lora_rank=16"
                )
            values[key] = _plain(value)
        folder = Path(config.output_dir) / re.sub(r"[^\w.=+-]+", "_", text)
        if any(one.folder == folder for one in found):
            raise ConfigError(f"{text!r} is named twice", where="methods", fix="give one of them another setting")
        found.append(Contestant(text, folder, {**values, "output_dir": str(folder)}))
        _check(found[-1])
    return found


def _concerns(kind: str, key: str, value: Any) -> bool:
    """Whether a key that all runs share means anything to a method: a rank is nothing to all weights."""
    if key not in AdapterKeys.model_fields:
        return True
    try:
        overlay(load_config(SftConfig, None, ["model", "data"]), {"adapter_type": kind, key: value}, key)
    except ConfigError:
        return False
    return True


def _plain(text: str) -> Any:
    """A number or truth value as such, anything else as text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _check(contestant: Contestant) -> None:
    """As `oarsmith sft` would see it."""
    try:
        overlay(load_config(SftConfig, None, ["model", "data"]), contestant.values, "methods")
    except ConfigError as error:
        raise ConfigError(f"{contestant.name}: {error.what}", where="methods", fix=error.fix) from error


def _train(contestant: Contestant, *, overwrite: bool) -> OarsmithError | None:
    """Run it, unless it has been run to its end with the same settings; what went wrong."""
    settings, folder = json.dumps(contestant.values, indent=1, sort_keys=True), contestant.folder
    kept = folder.parent / f"{folder.name}.{_SETTINGS}"
    if not overwrite and kept.is_file() and kept.read_text() == settings and (folder / "report.html").is_file():
        return None
    folder.parent.mkdir(parents=True, exist_ok=True)
    output = folder.parent / f"{folder.name}.output.txt"
    anew = ["--overwrite_output_dir", "true"] if overwrite or _is_other(folder, kept, settings) else []
    atomic_write_text(kept, settings)
    with output.open("wb") as printed:
        command = [sys.executable, "-m", "oarsmith", "sft", str(kept), *anew]
        status = subprocess.run(command, stdout=printed, stderr=subprocess.STDOUT, check=False).returncode
    if status == 0:
        return None
    lines = output.read_text(errors="replace").strip().splitlines() or ["nothing was printed"]
    how = f"exit status {status}" if status > 0 else f"ended by {signal.Signals(-status).name}"
    where = next((line for line in lines if "error" in line.lower()), lines[-1])
    return OarsmithError(f"{contestant.name}: {where}", where=how, fix=f"see {output}")


def _is_other(folder: Path, kept: Path, settings: str) -> bool:
    """Whether the folder holds a run of other settings; one of these that is not finished is gone on with."""
    return (folder / RUN_FILE).is_file() and not (kept.is_file() and kept.read_text() == settings)


def _report(config: CompareConfig, outcomes: list[Outcome], failed: list[str], console: Console) -> None:
    folder, environment = Path(config.output_dir), describe_environment()
    text = table(outcomes)
    title = f"{Path(config.model_name_or_path).name} on {Path(config.dataset_name_or_path).name}"
    content = {
        "title": title,
        "environment": environment,
        "methods": [outcome.record() for outcome in outcomes],
        "failed": failed,
    }
    atomic_write_text(folder / "compare.json", json.dumps(content, indent=1) + "\n")
    machine = f"{environment['cpu']}, {environment['threads']} threads"
    atomic_write_text(folder / "compare.md", f"# {title}\n\n{text}\n\n{machine}\n")
    atomic_write_bytes(folder / "compare.png", draw(outcomes, title))
    console.print(f"\n{text}\n", markup=False, soft_wrap=True)
    console.print(f"{machine}\ntable: {folder / 'compare.md'}\npicture: {folder / 'compare.png'}", soft_wrap=True)
