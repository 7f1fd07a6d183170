"""Experiment trackers beside the run's own log: TensorBoard, Weights & Biases, MLflow.

A resumed run goes on in the same place: the ids that trackers give a run are kept in the run folder. Steps that are
gone over again are written once, the numbers being the same.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from oarsmith.atomic import atomic_write_text
from oarsmith.errors import ConfigError, MissingExtraError

IDS_FILE = "trackers.json"
_PROJECT = "oarsmith"
# Seconds to wait for a server that may not be there.
_PATIENCE = 30
# What MLflow accepts as the value of a parameter, whatever the version.
_MAX_PARAMETER = 500

Say = Callable[[str], None]


class Tracker(Protocol):
    """Gets every record of the log (a ``step`` and numbers)."""

    def log(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """Several of them, or none."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def log(self, record: Mapping[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.log(record)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


class TensorBoard:
    """Scalars for TensorBoard under ``directory``."""

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "train-trackers", "report_to tensorboard") from error
        self._make = SummaryWriter
        self._directory = str(directory)
        self._writer: SummaryWriter | None = None

    def log(self, record: Mapping[str, Any]) -> None:
        if self._writer is None:
            # What an interrupted run wrote from this step on is dropped: it comes again.
            self._writer = self._make(self._directory, purge_step=record["step"])
        for name, value in _named(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandB:
    """A run of Weights & Biases: online where somebody is logged in and the server answers, else offline.

    ``WANDB_MODE`` and wandb's other variables are respected. Files lie in the run folder; ``wandb sync`` uploads an
    offline run later.
    """

    def __init__(self, output_dir: Path, run_name: str, config: Mapping[str, Any], say: Say) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError("wandb", "wandb", "report_to wandb") from error
        asked = os.environ.get("WANDB_MODE")
        logged_in = asked in ("offline", "disabled") or wandb.login(prompt=False, verify=False)
        if asked == "online" and not logged_in:
            raise ConfigError(
                "WANDB_MODE is online, but nobody is logged in", fix="run 'wandb login' first, or unset WANDB_MODE"
            )
        settings = wandb.Settings(silent=True, console="off", init_timeout=_PATIENCE)
        keys: dict[str, Any] = {
            "dir": str(output_dir),
            "id": run_id(output_dir, "wandb"),
            "name": run_name,
            "config": dict(config),
            "resume": "allow",
            "settings": settings,
            "project": None if "WANDB_PROJECT" in os.environ else _PROJECT,
        }
        try:
            self._run = wandb.init(**keys | {"mode": asked or ("online" if logged_in else "offline")})
        except wandb.errors.CommError as error:
            if asked == "online":
                raise ConfigError(f"wandb: {_first_line(error)}", fix="unset WANDB_MODE to record offline") from error
            say(f"wandb: no answer from the server ({_first_line(error)}); the run is recorded offline")
            self._run = wandb.init(**keys, mode="offline")

    def log(self, record: Mapping[str, Any]) -> None:
        self._run.log(_named(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow: in ``MLFLOW_TRACKING_URI``, or a database file in the run folder.

    A server that stops answering does not stop the training: that is said once, and the tracker falls silent.
    """

    def __init__(self, output_dir: Path, run_name: str, config: Mapping[str, Any], say: Say) -> None:
        try:
            # The store in a file needs these two, which the small package leaves out.
            import alembic  # noqa: F401
            import sqlalchemy  # noqa: F401
            from mlflow.exceptions import MlflowException
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise MissingExtraError("mlflow", "mlflow", "report_to mlflow") from error
        self._say, self._failure, self._silent = say, MlflowException, False
        own = f"sqlite:///{(output_dir / 'mlflow.db').resolve()}"
        uri = os.environ.get("MLFLOW_TRACKING_URI") or own
        output_dir.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(tracking_uri=uri)
        self._last: dict[str, int] = {}
        known = _read_ids(output_dir).get("mlflow")
        if known is not None:
            self._id = known
            self._client.update_run(known, status="RUNNING")
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self._client.get_experiment_by_name(experiment)
        place = f"file://{(output_dir / 'mlflow').resolve()}" if uri == own else None
        number = self._client.create_experiment(experiment, place) if found is None else found.experiment_id
        self._id = self._client.create_run(number, run_name=run_name).info.run_id
        for name, value in config.items():
            self._client.log_param(self._id, name, str(value)[:_MAX_PARAMETER])
        _keep_id(output_dir, "mlflow", self._id)

    def log(self, record: Mapping[str, Any]) -> None:
        if self._silent:
            return
        step = record["step"]
        try:
            for name, value in _named(record).items():
                if name not in self._last:
                    past = self._client.get_metric_history(self._id, name)
                    self._last[name] = max((metric.step for metric in past), default=-1)
                if step > self._last[name]:
                    self._client.log_metric(self._id, name, value, step=step)
                    self._last[name] = step
        except self._failure as error:
            self._silent = True
            self._say(f"mlflow: {_first_line(error)}; from step {step} on the numbers are in log.jsonl only")

    def close(self) -> None:
        if not self._silent:
            self._client.set_terminated(self._id)


def make_tracker(
    names: Sequence[str],
    output_dir: Path,
    *,
    run_name: str,
    config: Mapping[str, Any],
    board_dir: Path | None = None,
    say: Say = print,
) -> Tracker:
    """The trackers of a run: any of tensorboard, wandb, mlflow.

    Args:
        output_dir: the run folder, where their files and ids go.
        config: the run's settings, shown beside its curves.
        board_dir: TensorBoard's folder; None: ``tensorboard`` in the run folder.
        say: told what the user should know.

    Raises:
        MissingExtraError: a package is not installed; names the extra.
    """
    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(board_dir or output_dir / "tensorboard"),
        "wandb": lambda: WandB(output_dir, run_name, config, say),
        "mlflow": lambda: MLflow(output_dir, run_name, config, say),
    }
    return Trackers([makers[name]() for name in names])


def run_id(output_dir: Path, tracker: str) -> str:
    """The id of this run at a tracker that takes one: made once, then read from the run folder."""
    known = _read_ids(output_dir).get(tracker)
    return known if known is not None else _keep_id(output_dir, tracker, uuid.uuid4().hex[:12])


def _read_ids(output_dir: Path) -> dict[str, str]:
    path = output_dir / IDS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _keep_id(output_dir: Path, tracker: str, value: str) -> str:
    ids = {**_read_ids(output_dir), tracker: value}
    atomic_write_text(output_dir / IDS_FILE, json.dumps(ids, indent=1) + "\n")
    return value


def _named(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record as ``train/loss``, ``eval/loss``."""
    found = {}
    for name, value in record.items():
        if name != "step" and isinstance(value, (int, float)):
            group = "eval" if name.startswith("eval_") else "train"
            found[f"{group}/{name.removeprefix('eval_')}"] = float(value)
    return found


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
