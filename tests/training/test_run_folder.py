"""What may be started in a folder. How a whole run behaves there: tests/resume."""

import json

import pytest
import torch

from oarsmith.errors import ConfigError
from oarsmith.training.checkpoint import CheckpointStore
from oarsmith.training.run_folder import discard_run, open_run

SETTINGS = {"learning_rate": 1e-4, "seed": 1, "output_dir": "a", "stop": ("x",)}


@pytest.fixture
def run_dir(tmp_path):
    """A run with one checkpoint."""
    folder = tmp_path / "run"
    store = CheckpointStore(folder, keep=None)
    store.save(3, lambda path: None, {"w/exp_avg": torch.zeros(1)}, {})
    (folder / "run.json").write_text(json.dumps({**SETTINGS, "stop": ["x"]}))
    return folder


def opened(folder, settings=SETTINGS, *, overwrite=False, resume="auto", inputs=()):
    store = CheckpointStore(folder, keep=None)
    return open_run(folder, settings, overwrite=overwrite, resume=resume, store=store, inputs=inputs)


def test_a_new_folder_is_not_made_before_it_is_needed(tmp_path):
    assert opened(tmp_path / "new") is None
    assert not (tmp_path / "new").exists()


def test_the_same_settings_go_on(run_dir):
    assert opened(run_dir) == run_dir / "checkpoint-3"
    assert opened(run_dir, SETTINGS | {"output_dir": "b"}) == run_dir / "checkpoint-3"


def test_other_settings_are_named(run_dir):
    with pytest.raises(ConfigError, match=r"learning_rate was 0\.0001, now 0\.5"):
        opened(run_dir, SETTINGS | {"learning_rate": 0.5})


def test_a_run_killed_before_its_first_checkpoint_may_start_with_other_settings(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({**SETTINGS, "learning_rate": 3}))
    assert opened(tmp_path) is None


def test_a_finished_run_without_checkpoints_is_kept(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({**SETTINGS, "learning_rate": 3}))
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match="other settings"):
        opened(tmp_path)


def test_a_model_directory_is_no_run_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="holds a model, not a run"):
            opened(tmp_path, overwrite=overwrite)


def test_overwriting_spares_what_the_run_reads(run_dir):
    with pytest.raises(ConfigError, match="would delete"):
        opened(run_dir, overwrite=True, inputs=[run_dir / "merged"])
    assert opened(run_dir, overwrite=True, inputs=[run_dir.parent / "other"]) is None
    assert (run_dir / "checkpoint-3").exists(), "nothing is removed before the new run is ready to start"


def test_discard(run_dir, tmp_path):
    discard_run(run_dir)
    assert not run_dir.exists()
    (tmp_path / "no_run").mkdir()
    discard_run(tmp_path / "no_run")
    assert (tmp_path / "no_run").exists()
