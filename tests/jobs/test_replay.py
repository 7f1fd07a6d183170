"""``oarsmith replay``: a kept step of a real run, run again alone in the command line."""

import json
import math
import re
import shutil
import subprocess

import pytest
import torch

from oarsmith import cli
from oarsmith.checkpoint.config_file import read_config
from oarsmith.config.load import load_config
from oarsmith.config.sft import SftConfig
from oarsmith.jobs import sft
from oarsmith.jobs.start import Start
from oarsmith.training.forensics import Recorder, StepFacts, read_step
from oarsmith.training.optimizer import AdamW, AdamWSettings
from oarsmith.training.seeds import seed_step
from oarsmith.training.step import run_step
from tiny import command, environment, run_sft, write_rows, write_tiny_model

FACTS = StepFacts(step=3, seed=42, learning_rate=1e-3, max_grad_norm=1.0)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread(few_threads):
    """Tiny matrices."""


def keep_step(tmp_path, *, spoil=None, **keys):
    """Train two steps, then keep the third as a spike, or as a failure with ``spoil(model)`` before it."""
    model_dir = write_tiny_model(tmp_path / "model")
    rows, run = write_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    keys = {"max_length": 64, "per_device_train_batch_size": 1, "max_steps": 2, "save_strategy": "no", **keys}
    assert run_sft(model_dir, rows, run, **keys) == 0
    config = load_config(SftConfig, str(run / "run.json"), []).config
    base = model_dir if config.lora else run / "model"
    start = Start(base=base, config=read_config(base))
    model = sft.RECIPE.load_model(config, start, CPU).train()
    if spoil is not None:
        with torch.no_grad():
            spoil(model)
    tokenizer = sft.make_tokenizer(config)
    batches = [batch for batch, _ in zip(sft.RECIPE.build_data(config, start, tokenizer).train, range(2), strict=False)]
    keeper = Recorder(
        output_dir=run,
        model=model,
        objective=sft.RECIPE.objective(config),
        decode=tokenizer.decode,
        write_model=sft.RECIPE.weights(config, start, tokenizer).write,
    )
    if spoil is not None:
        return keeper.failure(FACTS, "the loss is nan", batches)
    optimizer = AdamW(((n, p) for n, p in model.named_parameters() if p.requires_grad), AdamWSettings())
    found = []

    def inspect(result):
        found.append(keeper.spike(FACTS, "the loss is odd", batches, result))

    seed_step(FACTS.seed, "step", FACTS.step - 1)
    objective = sft.RECIPE.objective(config)
    run_step(model, objective, batches, optimizer, lr=1e-3, max_grad_norm=1.0, inspect=inspect)
    return found[0]


@pytest.mark.parametrize("keys", [{}, {"lora": True, "lora_dropout": 0.3}, {"neftune": True, "recompute": True}])
def test_bit_for_bit(tmp_path, capsys, keys):
    folder = keep_step(tmp_path, **keys)
    capsys.readouterr()
    assert cli.main(["replay", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "step 3: the loss is odd" in out
    assert "both are the recorded ones, bit for bit" in out
    assert "layers.1.attention" in out and "final_norm" in out


def test_in_a_process_of_its_own_from_another_folder(tmp_path):
    """Weights come from the folder alone: the run and the model it began with are gone."""
    folder = keep_step(tmp_path)
    moved = tmp_path / "elsewhere" / "step"
    moved.parent.mkdir()
    shutil.move(folder, moved)
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(tmp_path / "model")
    done = subprocess.run(
        command(["replay", str(moved)]), env=environment(), capture_output=True, text=True, cwd=moved.parent
    )
    assert done.returncode == 0, done.stderr
    assert "bit for bit" in done.stdout


def test_a_run_that_fails(tmp_path, capsys):
    """All of it through the command line: the run ends, its message names the folder, the folder replays."""
    model_dir, rows = write_tiny_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    keys = {"max_length": 64, "learning_rate": 1e30, "max_grad_norm": 0, "gradient_accumulation_steps": 2}
    assert run_sft(model_dir, rows, tmp_path / "run", **keys) == 2
    (folder,) = (tmp_path / "run").glob("failure-step-*")
    assert f"oarsmith replay {folder}" in capsys.readouterr().err
    assert cli.main(["replay", str(folder)]) == 1
    assert "both are the recorded ones, bit for bit" in capsys.readouterr().out


def overflow(model):
    model.layers[0].ffn.down.weight.mul_(1e30)
    model.layers[0].ffn.gate_up.weight.mul_(1e15)


def test_a_failure_shows_where_it_starts(tmp_path, capsys):
    folder = keep_step(tmp_path, spoil=overflow)
    output = tmp_path / "statistics.json"
    assert cli.main(["replay", str(folder), "--output_file", str(output)]) == 1
    out = capsys.readouterr().out
    assert re.search(r"layers\.0\.ffn .* (all|of) .*<- first", out)
    assert "first that is not finite: output of layers.0.ffn" in out
    assert "both are the recorded ones, bit for bit" in out, "nan is nan"
    found = json.loads(output.read_text())
    assert math.isnan(float(found["loss"]))
    assert found["forward"]["layers.0.attention"]["not_finite"] == 0


def test_another_number_format_tells_overflow_from_bad_data(tmp_path, capsys):
    """What is beyond 65,504 is infinite in fp16 and nothing special in fp32."""

    def large(model):
        model.layers[0].ffn.gate_up.weight.mul_(100)
        model.layers[0].ffn.down.weight.mul_(2e4)

    folder = keep_step(tmp_path)
    run = json.loads((folder / "run.json").read_text())
    assert run["dtype"] == "fp32"
    assert cli.main(["replay", str(folder), "--dtype", "bf16"]) == 0
    out = capsys.readouterr().out
    assert "recorded: loss" in out and "bit for bit" not in out
    shutil.rmtree(tmp_path / "run")
    folder = keep_step(tmp_path, spoil=large)
    assert cli.main(["replay", str(folder)]) == 0
    assert cli.main(["replay", str(folder), "--dtype", "fp16"]) == 1
    assert "first that is not finite: output of layers.0" in capsys.readouterr().out


def test_one_document_at_a_time_finds_the_culprit(tmp_path, capsys):
    """A token whose row of the table is broken: only the document that has it fails."""
    folder = keep_step(tmp_path)
    ids = [set(json.loads(line)["ids"]) for line in (folder / "documents.jsonl").read_text().splitlines()]
    culprit = next(n for n, own in enumerate(ids) if own - set().union(*ids[:n], *ids[n + 1 :]))
    token = min(ids[culprit] - set().union(*ids[:culprit], *ids[culprit + 1 :]))
    shutil.rmtree(tmp_path / "run")

    def spoil(model):
        model.embedding.weight[token] = math.inf

    folder = keep_step(tmp_path, spoil=spoil)
    assert len(read_step(folder).batches) == 2
    failing = [n for n in range(len(ids)) if cli.main(["replay", str(folder), "--document", str(n)]) == 1]
    assert failing == [culprit]
    assert cli.main(["replay", str(folder), "--document", "999"]) == 2
    assert "there is no document 999" in capsys.readouterr().err


def test_what_cannot_be_replayed(tmp_path, capsys):
    folder = keep_step(tmp_path, lora=True)
    shutil.move(tmp_path / "model", tmp_path / "gone")
    assert cli.main(["replay", str(folder)]) == 2
    assert "the frozen weights are not there any more" in capsys.readouterr().err
    (folder / "run.json").unlink()
    assert cli.main(["replay", str(folder)]) == 2
    assert "no run.json here" in capsys.readouterr().err
    assert cli.main(["replay", str(tmp_path)]) == 2
    assert "failure-step-N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("job", "keys"),
    [
        ("dpo", {"lora": True}),
        ("dpo", {"loss_type": "bco_pair"}),
        ("kto", {"gradient_accumulation_steps": 2}),
        ("reward", {}),
        ("reward", {"lora": True, "loss_type": "token-wise"}),
        ("reward", {"process_reward": True}),
    ],
)
def test_steps_of_judged_answers(tmp_path, capsys, monkeypatch, job, keys):
    """Their batches have answers, labels and references, and some losses remember the steps before."""
    monkeypatch.setattr("oarsmith.methods.reference.cache_directory", lambda: tmp_path / "cache")
    model_dir, rows = write_tiny_model(tmp_path / "model"), []
    for n in range(12):
        pair = {"prompt": f"Say {n}.", "chosen": f"Yes, it is {n}.", "rejected": "No."}
        steps = {"prompt": f"Say {n}.", "completions": ["Yes.", f"It is {n}."], "labels": [n % 2, 1]}
        rows.append(steps if "process_reward" in keys else pair)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # The first steps pass; a weight that is not finite then makes one fail.
    given = {"max_length": 96, "learning_rate": 1e30, "max_grad_norm": 0, "max_steps": 4, "device": "cpu", **keys}
    given |= {"output_dir": tmp_path / "run", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    words = [job, str(model_dir), str(tmp_path / "rows.jsonl"), *(f"--{key}={value}" for key, value in given.items())]
    assert cli.main(words) == 2
    (folder,) = (tmp_path / "run").glob("failure-step-*")
    capsys.readouterr()
    assert cli.main(["replay", str(folder)]) == 1
    printed = capsys.readouterr()
    assert "both are the recorded ones, bit for bit" in printed.out, printed
    assert cli.main(["replay", str(folder), "--document", "1"]) in (0, 1)
    assert cli.main(["replay", str(folder), "--document", "999"]) == 2
