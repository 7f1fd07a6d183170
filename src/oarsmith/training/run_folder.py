"""The folder of a run: what may be started in it, and where it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from oarsmith.atomic import remove_directory
from oarsmith.config.parallel import LAYOUT_KEYS
from oarsmith.config.resolved import RUN_FILE
from oarsmith.errors import ConfigError
from oarsmith.training.checkpoint import MANIFEST, CheckpointStore

# Keys that change where a run is written or how it is shown, not what it computes.
_FREE_KEYS = frozenset(
    {
        "output_dir",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "disable_tqdm",
        "report_to",
        "run_name",
        "logging_dir",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "use_async_save",
        "ignore_save_lr_and_optim",
        "ignore_load_lr_and_optim",
        "ignore_data_skip",
        "loss_spike_factor",
        "data_cache",
        "share_folder",
        "do_predict",
        # A step stays what it is, however it is split: the checkpoint says how many batches it had.
        "gradient_accumulation_steps",
        "nproc_per_node",
        "nnodes",
        "rdzv_endpoint",
        "max_restarts",
        "ddp_timeout",
        *LAYOUT_KEYS,
    }
)
_SETTINGS: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])
_MODEL_FILES = ("model.safetensors", "model.safetensors.index.json", "adapter_config.json")


def open_run(
    output_dir: Path,
    settings: Mapping[str, Any],
    *,
    overwrite: bool,
    resume: str,
    store: CheckpointStore,
    inputs: Sequence[Path] = (),
) -> Path | None:
    """Check that a run may go into ``output_dir``; the checkpoint to go on from, or None to start anew.

    Nothing is removed yet, so that a mistake found later (in the data, say) costs no finished run: see ``discard_run``.

    Args:
        inputs: model and data of the run, which an overwritten folder must not hold.

    Raises:
        ConfigError: the folder holds a run with other settings, a model, its own inputs, or no such checkpoint.
    """
    if any((output_dir / name).exists() for name in _MODEL_FILES):
        raise ConfigError(f"{output_dir} holds a model, not a run", where="output_dir", fix="choose another output_dir")
    if overwrite:
        _keep_inputs(output_dir, inputs)
        return None
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
    if (output_dir / RUN_FILE).is_file() and (latest is not None or _has_result(output_dir)):
        _same_run(output_dir, settings)
    return latest


def discard_run(output_dir: Path) -> None:
    """Remove the run in a folder, if there is one."""
    if (output_dir / RUN_FILE).is_file():
        remove_directory(output_dir)


def _keep_inputs(output_dir: Path, inputs: Sequence[Path]) -> None:
    folder = output_dir.resolve()
    for path in inputs:
        if folder == path.resolve() or folder in path.resolve().parents:
            raise ConfigError(
                f"overwriting {output_dir} would delete {path}, which this run reads",
                where="overwrite_output_dir",
                fix="choose another output_dir",
            )


def _settings_of(path: Path) -> dict[str, Any]:
    try:
        return _SETTINGS.validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigError(
            f"not the settings of a run: {error.errors()[0]['msg']}",
            where=str(path),
            fix="repair it; or choose another output_dir; or set overwrite_output_dir true to start over",
        ) from error


def _has_result(output_dir: Path) -> bool:
    return any((output_dir / name).is_dir() for name in ("model", "adapter"))


def _same_run(output_dir: Path, settings: Mapping[str, Any]) -> None:
    before = _settings_of(output_dir / RUN_FILE)
    now = json.loads(json.dumps(dict(settings)))
    changed = [key for key in now if key not in _FREE_KEYS and key in before and before[key] != now[key]]
    if changed:
        shown = "; ".join(f"{key} was {before[key]!r}, now {now[key]!r}" for key in changed[:4])
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise ConfigError(
            f"{output_dir} holds a run with other settings: {shown}{more}",
            where="output_dir",
            fix="choose another output_dir; or overwrite_output_dir true to start over; or name the checkpoint in "
            "resume_from_checkpoint to go on with the new settings",
        )
