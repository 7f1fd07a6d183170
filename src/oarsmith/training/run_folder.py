"""The folder of a run: what may be started in it, and where it goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oarsmith.errors import ConfigError
from oarsmith.training.checkpoint import MANIFEST, CheckpointStore

RUN_FILE = "run.json"
# Keys that change where or how a run is shown, not what it computes.
_FREE_KEYS = frozenset(
    ["output_dir", "overwrite_output_dir", "resume_from_checkpoint", "disable_tqdm", "report_to", "logging_dir", "save_total_limit"]
)


def open_run(
    output_dir: Path, settings: Mapping[str, Any], *, overwrite: bool, resume: str, store: CheckpointStore
) -> Path | None:
    """Make ready to train in ``output_dir``; the checkpoint to go on from, or None to start anew.

    Raises:
        ConfigError: the folder holds a run with other settings, files that are no run, or no such checkpoint.
    """
    if overwrite and (output_dir / RUN_FILE).is_file():
        shutil.rmtree(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if resume not in ("auto", "none"):
        path = Path(resume)
        if not (path / MANIFEST).is_file():
            raise ConfigError(
                f"{resume!r} is not a complete checkpoint",
                where="resume_from_checkpoint",
                fix="name a checkpoint-N directory, or auto",
            )
        return path
    latest = store.latest()
    if resume == "none" and latest is not None:
        raise ConfigError(
            f"{output_dir} already holds checkpoints",
            where="resume_from_checkpoint none",
            fix="choose another output_dir, or set overwrite_output_dir true to discard them",
        )
    if latest is not None:
        _same_run(output_dir, settings)
    return latest


def _same_run(output_dir: Path, settings: Mapping[str, Any]) -> None:
    before = json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8"))
    now = json.loads(json.dumps(dict(settings)))
    changed = [key for key in now if key not in _FREE_KEYS and key in before and before[key] != now[key]]
    if changed:
        shown = "; ".join(f"{key} was {before[key]!r}, now {now[key]!r}" for key in changed[:4])
        raise ConfigError(
            f"{output_dir} holds a run with other settings: {shown}",
            where="output_dir",
            fix="choose another output_dir; or overwrite_output_dir true to start over; or name the checkpoint in "
            "resume_from_checkpoint to go on with the new settings",
        )
