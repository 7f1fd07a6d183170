"""TensorBoard gets every record of the log."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from oarsmith.training.trackers import NoTracker, make_tracker


def test_tensorboard_files_are_readable(tmp_path):
    tracker = make_tracker("tensorboard", tmp_path / "board")
    tracker.log({"step": 1, "loss": 2.5, "learning_rate": 1e-3})
    tracker.log({"step": 2, "loss": 2.25, "learning_rate": 5e-4})
    tracker.log({"step": 2, "eval_loss": 2.0})
    tracker.close()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {"train/loss", "train/learning_rate", "eval/loss"}
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(1, 2.5), (2, 2.25)]
    assert [(event.step, event.value) for event in board.Scalars("eval/loss")] == [(2, 2.0)]


def test_none_writes_nothing(tmp_path):
    tracker = make_tracker("none", tmp_path / "board")
    tracker.log({"step": 1, "loss": 2.5})
    tracker.close()
    assert isinstance(tracker, NoTracker)
    assert not (tmp_path / "board").exists()
