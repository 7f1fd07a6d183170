"""The loop as a run shows it: when it logs, evaluates and saves, and how it ends when a step goes wrong."""

import dataclasses
import json
import math
import os
import signal

import pytest
import torch

import oarsmith
from oarsmith import cli
from oarsmith.config.load import load_config
from oarsmith.config.sft import SftConfig
from oarsmith.errors import StoppedError
from oarsmith.jobs import tuning
from oarsmith.jobs.console import make_console
from oarsmith.jobs.loop_parts import make_loop
from oarsmith.jobs.runtime import make_tokenizer
from oarsmith.methods.sft import OBJECTIVE, build_data
from oarsmith.training.checkpoint import CheckpointStore
from oarsmith.training.evaluate import Evaluation
from oarsmith.training.progress import Progress
from tiny import TOKENIZER, read_lines, run_sft, tiny_decoder, write_rows, write_tiny_model

KEYS = {"max_length": 64, "per_device_train_batch_size": 2, "logging_steps": 1}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("loop") / "model")


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl")


def steps(folder, key):
    return [record["step"] for record in read_lines(folder / "log.jsonl") if key in record]


def saved(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def test_by_steps(model_dir, rows, tmp_path):
    keys = KEYS | {"logging_steps": 3, "eval_steps": 2, "save_steps": 4, "evaluation_strategy": "steps"}
    assert run_sft(model_dir, rows, tmp_path / "run", **keys, eval_split_ratio=0.2, max_steps=7) == 0
    assert steps(tmp_path / "run", "loss") == [1, 3, 6, 7]
    assert steps(tmp_path / "run", "eval_loss") == [2, 4, 6, 7]
    assert saved(tmp_path / "run") == [4, 7]


def test_by_epochs(model_dir, rows, tmp_path):
    keys = KEYS | {"save_strategy": "epoch", "eval_split_ratio": 0.2, "gradient_accumulation_steps": 3}
    assert run_sft(model_dir, rows, tmp_path / "run", **keys, num_train_epochs=2.5) == 0
    records = [record for record in read_lines(tmp_path / "run" / "log.jsonl") if "loss" in record]
    whole = [record["step"] for record in records if record["epoch"] == int(record["epoch"])]
    assert len(whole) == 2, "an update never spans two epochs"
    last = records[-1]
    assert 2.4 < last["epoch"] < 2.9, "half an epoch, rounded up to whole updates"
    assert saved(tmp_path / "run") == steps(tmp_path / "run", "eval_loss") == [*whole, last["step"]]


def test_no_checkpoints(model_dir, rows, tmp_path):
    assert run_sft(model_dir, rows, tmp_path / "run", **KEYS, max_steps=2, save_strategy="no") == 0
    assert saved(tmp_path / "run") == []
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_the_best_checkpoint_is_returned_to(model_dir, rows, tmp_path, capsys):
    """With a learning rate that ruins the model the first evaluations are the best."""
    keys = KEYS | {"evaluation_strategy": "steps", "eval_steps": 1, "save_steps": 2, "save_total_limit": 1}
    keys |= {"learning_rate": 2.0, "lr_scheduler_type": "cosine", "warmup_steps": 5, "load_best_model_at_end": True}
    assert run_sft(model_dir, rows, tmp_path / "run", **keys, max_steps=8, eval_split_ratio=0.2) == 0
    found = {r["step"]: r["eval_loss"] for r in read_lines(tmp_path / "run" / "log.jsonl") if "eval_loss" in r}
    best = min((step for step in found if step % 2 == 0), key=found.__getitem__)
    assert best < 8
    assert saved(tmp_path / "run") == [best, 8]
    weights = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    assert weights == (tmp_path / "run" / f"checkpoint-{best}" / "model.safetensors").read_bytes()
    out = capsys.readouterr().out
    assert f"back to the best checkpoint, step {best}" in out
    assert f"eval:   loss {found[best]:.4f}" in out


def test_a_learning_rate_that_explodes(model_dir, rows, tmp_path, capsys):
    """The run ends with the rows of the broken step, and the checkpoint before it stays usable."""
    keys = KEYS | {"learning_rate": 1e30, "max_grad_norm": 0, "save_steps": 1}
    assert run_sft(model_dir, rows, tmp_path / "run", **keys) == 2
    message = capsys.readouterr().err
    assert "the step was not applied" in message
    assert f"oarsmith replay {tmp_path}" in message
    step = steps(tmp_path / "run", "loss")[-1] + 1
    folder = tmp_path / "run" / f"failure-step-{step}"
    assert str(folder) in message
    documents = read_lines(folder / "documents.jsonl")
    assert all(document["where"].startswith(str(rows)) for document in documents)
    assert all("<|im_start|>assistant" in document["text"] for document in documents)
    report = json.loads((folder / "report.json").read_text())
    assert report["step"] == step
    assert "loss is" in report["reason"] or "gradient norm is" in report["reason"]
    assert saved(tmp_path / "run")[-1] == step - 1
    assert not (tmp_path / "run" / "model").exists()


def test_a_nan_weight_is_named(tmp_path, rows, capsys):
    model = tiny_decoder()
    with torch.no_grad():
        model.layers[0].attention.qkv.weight[0, 0] = math.nan
    oarsmith.save_model(model, tmp_path / "broken", oarsmith.load_tokenizer(TOKENIZER))
    assert run_sft(tmp_path / "broken", rows, tmp_path / "run", **KEYS | {"max_length": 128}) == 2
    assert "the loss is nan at step 1" in capsys.readouterr().err
    report = json.loads((tmp_path / "run" / "failure-step-1" / "report.json").read_text())
    assert report["parameters_not_finite"] == ["layers.0.attention.qkv.weight"]
    assert saved(tmp_path / "run") == []


def test_a_loss_that_jumps_is_kept_and_training_goes_on(model_dir, tmp_path, capsys):
    """After 30 rows that repeat themselves comes one of random words: easy losses, then a jump."""
    easy = [{"src": "Say it.", "tgt": "It is it is it is it."}] * 30
    hard = [{"src": "Say it.", "tgt": "zebra quilt 93 !! vortex §§ jam"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in easy + hard))
    keys = {"max_length": 64, "logging_steps": 1, "zero_padding": False, "per_device_train_batch_size": 1}
    keys |= {"learning_rate": 1e-2, "num_train_epochs": 2, "save_steps": 100}
    assert run_sft(model_dir, tmp_path / "rows.jsonl", tmp_path / "run", **keys) == 0
    events = [record for record in read_lines(tmp_path / "run" / "log.jsonl") if "event" in record]
    assert [event["event"] for event in events] == ["spike"] * len(events) and events
    folder = tmp_path / "run" / f"spike-step-{events[0]['step']}"
    assert folder.name in events[0]["detail"]
    assert "zebra" in (folder / "documents.jsonl").read_text()
    capsys.readouterr()
    assert cli.main(["replay", str(folder), "--num_threads", "1"]) == 0
    assert "both are the recorded ones, bit for bit" in capsys.readouterr().out


def test_tensorboard(model_dir, rows, tmp_path):
    keys = KEYS | {"report_to": "tensorboard", "eval_split_ratio": 0.2, "max_steps": 2}
    assert run_sft(model_dir, rows, tmp_path / "run", **keys, evaluation_strategy="steps", eval_steps=1) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    logged = [r["loss"] for r in read_lines(tmp_path / "run" / "log.jsonl") if "loss" in r]
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(logged)
    assert len(board.Scalars("eval/loss")) == 2


def test_a_signal_during_an_evaluation_waits_for_the_next_step(model_dir, rows, tmp_path, few_threads):
    """Whatever the moment of SIGTERM, what the message says is saved is there."""
    words = [f"--{key}={value}" for key, value in {**KEYS, "eval_steps": 2, "evaluation_strategy": "steps"}.items()]
    words += ["--eval_split_ratio=0.2", "--dtype=fp32", f"--output_dir={tmp_path}", "--save_strategy=no"]
    resolved = load_config(SftConfig, None, [str(model_dir), str(rows), *words])
    resolved, start = tuning.start(resolved, torch.device("cpu"))
    config, tokenizer = resolved.config, make_tokenizer(resolved.config)
    loop = make_loop(
        config,
        model=tuning.load_trainable(config, start, torch.device("cpu")),
        objective=OBJECTIVE,
        loader=build_data(config, tokenizer).train,
        store=CheckpointStore(tmp_path, keep=None),
        progress=Progress(make_console(), quiet=True),
        weights=tuning.weights_of(config, start, tokenizer),
        evaluate=None,
        decode=tokenizer.decode,
        tokens_per_pass=64,
    )

    def evaluate_and_signal():
        os.kill(os.getpid(), signal.SIGTERM)
        return Evaluation(loss=1.0, accuracy=0.0, count=1.0).record()

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="saved at step 3 of"):
        dataclasses.replace(loop, evaluate=evaluate_and_signal).run(None)
    assert saved(tmp_path) == [3]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_no_longer_gets_better_ends_early(model_dir, rows, tmp_path, capsys):
    """A rate that ruins the model: after the first evaluation none is better."""
    keys = KEYS | {"evaluation_strategy": "steps", "eval_steps": 1, "save_steps": 1, "learning_rate": 2.0}
    keys |= {"early_stopping_patience": 2, "eval_split_ratio": 0.2, "max_steps": 30, "warmup_steps": 2}
    assert run_sft(model_dir, rows, tmp_path / "run", **keys) == 0
    losses = [record["eval_loss"] for record in read_lines(tmp_path / "run" / "log.jsonl") if "eval_loss" in record]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 30
    assert "stopping early: 2 evaluations" in capsys.readouterr().out
    assert max(saved(tmp_path / "run")) == len(losses)
    # The same command finds a run that has ended and goes no further.
    assert run_sft(model_dir, rows, tmp_path / "run", **keys) == 0
    assert steps(tmp_path / "run", "loss")[-1] == len(losses)


def test_background_saves_change_nothing(model_dir, rows, tmp_path):
    for name, flag in (("plain", False), ("background", True)):
        keys = KEYS | {"save_steps": 1, "max_steps": 4, "use_async_save": flag}
        assert run_sft(model_dir, rows, tmp_path / name, **keys) == 0
    assert saved(tmp_path / "background") == [1, 2, 3, 4]
    for step in (1, 4):
        manifests = [tmp_path / name / f"checkpoint-{step}" / "manifest.json" for name in ("plain", "background")]
        assert manifests[0].read_bytes() == manifests[1].read_bytes()


def test_checkpoints_without_states(model_dir, rows, tmp_path, capsys):
    keys = KEYS | {"save_steps": 2, "max_steps": 4}
    assert run_sft(model_dir, rows, tmp_path / "run", **keys, ignore_save_lr_and_optim=True, save_total_limit=1) == 0
    sizes = (tmp_path / "run" / "checkpoint-4" / "trainer" / "optimizer.safetensors").stat().st_size
    assert sizes < 100
    longer = {"resume_from_checkpoint": tmp_path / "run" / "checkpoint-4", "max_steps": 6}
    assert run_sft(model_dir, rows, tmp_path / "more", **keys | longer) == 2
    assert "without the optimizer's state" in capsys.readouterr().err
    longer |= {"ignore_load_lr_and_optim": True, "ignore_data_skip": True}
    assert run_sft(model_dir, rows, tmp_path / "more", **keys | longer) == 0
    assert steps(tmp_path / "more", "loss") == [5, 6]


def test_the_result_is_scored_on_the_test_rows(model_dir, tmp_path, capsys):
    for name, first in (("train", 0), ("test", 200)):
        write_rows(tmp_path / f"{name}.jsonl", 12, first)
    assert run_sft(model_dir, tmp_path, tmp_path / "run", **KEYS, max_steps=2, do_predict=True) == 0
    kept = json.loads((tmp_path / "run" / "test.json").read_text())
    assert kept["step"] == 2
    assert f"test:   loss {kept['eval_loss']:.4f}" in capsys.readouterr().out
