"""Every tracker gets every record of the log, offline; a resumed run goes on in the same place."""

import json
import struct
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from oarsmith.errors import ConfigError, MissingExtraError
from oarsmith.training.trackers import IDS_FILE, make_tracker
from tiny import environment

FIRST = [
    {"step": 1, "loss": 2.5, "learning_rate": 1e-3},
    {"step": 2, "loss": 2.25, "learning_rate": 5e-4},
    {"step": 2, "eval_loss": 2.0},
    {"step": 3, "loss": 2.125, "learning_rate": 1e-4},
]
# Killed after step 3 and resumed from a checkpoint at step 2: step 3 comes again.
SECOND = [{"step": 3, "loss": 2.125, "learning_rate": 1e-4}, {"step": 4, "loss": 2.0, "learning_rate": 1e-5}]
LOSSES = [(1, 2.5), (2, 2.25), (3, 2.125), (4, 2.0)]


def track(names, folder, records, say=print):
    tracker = make_tracker(names, folder, run_name="mine", config={"seed": 42, "lora": True}, say=say)
    for record in records:
        tracker.log(record)
    tracker.close()


def test_tensorboard_draws_one_curve(tmp_path):
    for records in (FIRST, SECOND):
        track(["tensorboard"], tmp_path, records)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {"train/loss", "train/learning_rate", "eval/loss"}
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == LOSSES
    assert [(event.step, event.value) for event in board.Scalars("eval/loss")] == [(2, 2.0)]


def test_none_writes_nothing(tmp_path):
    track([], tmp_path, FIRST)
    assert list(tmp_path.iterdir()) == []


def wandb_records(path):
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB; crc, length, type) behind 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    # Nobody is logged in here, whoever runs the tests.
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for records in (FIRST, SECOND):
        # In a process of its own, as a run is: wandb writes from a helper that ends with it.
        code = (
            "from pathlib import Path\n"
            "from oarsmith.training.trackers import make_tracker\n"
            f"folder = Path({str(tmp_path / 'run')!r})\n"
            "tracker = make_tracker(['wandb'], folder, run_name='mine', config={'seed': 42})\n"
            f"for record in {records!r}:\n    tracker.log(record)\n"
            "tracker.close()\n"
        )
        subprocess.run([sys.executable, "-c", code], env=environment(), check=True)
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    known = json.loads((tmp_path / "run" / IDS_FILE).read_text())["wandb"]
    assert [file.name for file in files] == [f"run-{known}.wandb"] * 2, "the same run, so that a sync joins them"
    found = {}
    for file in files:
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "run":
                assert (record.run.display_name, record.run.project) == ("mine", "oarsmith")
            for item in record.history.item:
                name = item.key or ".".join(item.nested_key)
                if name in ("train/loss", "eval/loss"):
                    found.setdefault(name, {})[record.history.step.num] = json.loads(item.value_json)
    assert found == {"train/loss": dict(LOSSES), "eval/loss": {2: 2.0}}


def test_wandb_disabled_is_respected(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    track(["wandb"], tmp_path, FIRST)
    assert not list(tmp_path.glob("wandb/*/*.wandb"))


def test_wandb_never_asks_for_a_key(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "online", "HOME": tmp_path, "NETRC": tmp_path / "netrc"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="nobody is logged in"):
        track(["wandb"], tmp_path / "run", FIRST)


def test_mlflow_in_a_file(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    for records in (FIRST, SECOND):
        track(["mlflow"], tmp_path, records)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("oarsmith").experiment_id])
    assert run.info.run_name == "mine"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "42", "lora": "True"}
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == LOSSES
    assert client.get_metric_history(run.info.run_id, "eval/loss")[0].value == 2.0


def test_mlflow_without_an_answer_falls_silent(tmp_path, monkeypatch):
    """The server went away in the middle of a run."""
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    said = []
    tracker = make_tracker(["mlflow"], tmp_path, run_name="mine", config={}, say=said.append)
    tracker.log(FIRST[0])
    monkeypatch.setattr(tracker._trackers[0], "_id", "no such run")
    tracker.log(FIRST[1])
    tracker.log(FIRST[3])
    tracker.close()
    assert len(said) == 1
    assert "from step 2 on" in said[0]


def test_several_at_once(tmp_path):
    pytest.importorskip("mlflow")
    track(["tensorboard", "mlflow"], tmp_path, FIRST)
    assert (tmp_path / "mlflow.db").exists()
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("tensorboard", "tensorboard", "train-trackers"),
        ("wandb", "wandb", "wandb"),
        ("mlflow", "mlflow", "mlflow"),
        ("mlflow", "sqlalchemy", "mlflow"),
    ],
)
def test_a_missing_package_names_its_extra(tmp_path, name, module, extra):
    code = (
        "import sys\n"
        f"sys.modules[{module!r}] = None\n"
        "from pathlib import Path\n"
        "from oarsmith.training.trackers import make_tracker\n"
        "from oarsmith.errors import ConfigError, MissingExtraError\n"
        "try:\n"
        f"    make_tracker([{name!r}], Path({str(tmp_path)!r}), run_name='', config={{}}).log({{'step': 1}})\n"
        "except MissingExtraError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert f"oarsmith[{extra}]" in done.stdout, done.stdout + done.stderr


def test_the_error_is_for_users():
    assert "pip install 'oarsmith[wandb]'" in str(MissingExtraError("wandb", "wandb", "report_to wandb"))
