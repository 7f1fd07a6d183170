"""What is kept of a step that went wrong, and that it comes back as it was."""

import dataclasses
import json
import math

import pytest
import torch

from oarsmith.checkpoint.hf import load_decoder, write_decoder
from oarsmith.config.resolved import RUN_FILE
from oarsmith.errors import CheckpointError
from oarsmith.losses.token import token_cross_entropy
from oarsmith.training.forensics import Recorder, StepFacts, differs_by, only_document, read_step
from oarsmith.training.optimizer import AdamW, AdamWSettings
from oarsmith.training.seeds import seed_step
from oarsmith.training.step import run_step
from tiny import batches_of, random_samples, read_lines, tiny_decoder

FACTS = StepFacts(step=7, seed=5, learning_rate=1e-3, max_grad_norm=1.0)
SAMPLES = random_samples((5, 8, 3))
BATCHES = batches_of(SAMPLES, 2)


@pytest.fixture(autouse=True)
def _one_thread(few_threads):
    """Tiny matrices."""


def recorder(folder, model, **more):
    folder.mkdir(exist_ok=True)
    return Recorder(
        output_dir=folder,
        model=model,
        objective=token_cross_entropy,
        decode=lambda ids: f"{len(ids)} ids \ud83d",
        write_model=write_decoder,
        **more,
    )


def same_batch(a, b):
    tensors = ("input_ids", "positions", "targets", "weights")
    values = ("bounds", "num_tokens", "num_trained", "where")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors) and all(
        getattr(a, name) == getattr(b, name) for name in values
    )


def test_a_failure_comes_back(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / RUN_FILE).write_text('{"seed": 5}')
    model = tiny_decoder()
    with torch.no_grad():
        model.layers[1].ffn.down.weight[2, 3] = math.inf
    folder = recorder(tmp_path / "run", model).failure(FACTS, "the loss is nan", BATCHES)
    assert folder == tmp_path / "run" / "failure-step-7"
    assert not list((tmp_path / "run").glob(".*")), "no temporary file is left"
    step = read_step(folder)
    report = step.report
    assert (report.step, report.kind, report.reason) == (7, "failure", "the loss is nan")
    assert math.isnan(report.loss)
    assert (report.learning_rate, report.max_grad_norm, report.seed) == (1e-3, 1.0, 5)
    assert report.first_not_finite == "weight layers.1.ffn.down.weight"
    assert report.parameters_not_finite == ["layers.1.ffn.down.weight"]
    assert report.config == model.config
    assert report.environment["threads"] == 1
    assert len(step.batches) == 2
    assert all(same_batch(a, b) for a, b in zip(step.batches, BATCHES, strict=True))
    json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)  # nan is no JSON
    statistics = json.loads((folder / "statistics.json").read_text())
    assert statistics["weights"]["layers.1.ffn.down.weight"]["not_finite"] == 1
    assert statistics["forward"]["layers.0"]["not_finite"] == 0
    assert statistics["forward"]["layers.1.ffn"]["not_finite"] > 0
    assert (folder / RUN_FILE).read_text() == '{"seed": 5}'
    assert step.weights_dir is not None
    kept = load_decoder(step.weights_dir)
    for (name, a), (_, b) in zip(model.named_parameters(), kept.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_documents_as_text(tmp_path):
    folder = recorder(tmp_path / "run", tiny_decoder()).failure(FACTS, "because", BATCHES)
    documents = read_lines(folder / "documents.jsonl")
    assert [d["where"] for d in documents] == ["random:0", "random:1", "random:2"]
    assert [d["micro_batch"] for d in documents] == [0, 0, 1]
    assert [d["text"] for d in documents] == ["5 ids ?", "8 ids ?", "3 ids ?"], "half a character is no text"
    assert documents[1]["ids"] == SAMPLES[1].ids.tolist()
    assert documents[1]["weights_of_next"][:-1] == SAMPLES[1].weights[1:].tolist()


def test_a_spike_is_kept_in_the_middle_of_a_step(tmp_path):
    """From ``inspect``, between backward and update: the step goes on as if nobody had looked."""

    def trained(keep):
        model = tiny_decoder(lora_rank=4)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" not in name)
        optimizer = AdamW(((n, p) for n, p in model.named_parameters() if p.requires_grad), AdamWSettings())
        model.neftune_alpha = 5.0  # draws random numbers
        seed_step(5, "step", 6)
        keeper = recorder(tmp_path / "run", model.train())
        keeper = dataclasses.replace(keeper, write_model=lambda model, folder: None)
        paths = []

        def inspect(result):
            if keep:
                paths.append((keeper.spike(FACTS, "odd", BATCHES, result), result))

        run_step(model, token_cross_entropy, BATCHES, optimizer, lr=1e-2, max_grad_norm=1.0, inspect=inspect)
        return model, torch.rand(3), paths

    plain, looked_at = trained(False), trained(True)
    for (name, a), (_, b) in zip(plain[0].named_parameters(), looked_at[0].named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(plain[1], looked_at[1]), "the random numbers after it are the same too"
    ((folder, result),) = looked_at[2]
    step = read_step(folder)
    assert step.report.kind == "spike"
    assert step.report.loss == result.total / result.count
    assert step.report.grad_norm == result.grad_norm
    losses = [loss * batch.num_trained for loss, batch in zip(step.report.micro_batch_losses, BATCHES, strict=True)]
    assert sum(losses) == pytest.approx(result.total), "the step was measured with its own random numbers"
    seed_step(5, "step", 6)
    assert torch.equal(step.rng, torch.get_rng_state())


def test_at_most_three_spikes(tmp_path):
    model = tiny_decoder()
    keeper = recorder(tmp_path / "run", model)
    optimizer = AdamW(model.named_parameters(), AdamWSettings())
    result = run_step(model, token_cross_entropy, BATCHES, optimizer, lr=0.0, max_grad_norm=0.0)

    def spike(step):
        return keeper.spike(dataclasses.replace(FACTS, step=step), "odd", BATCHES, result)

    assert all(spike(step) is not None for step in (3, 5, 8))
    assert spike(9) is None
    assert spike(5) is not None, "a step that is gone over again replaces its folder"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [f"spike-step-{n}" for n in (3, 5, 8)]


def test_without_room_the_weights_are_left_out(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("oarsmith.training.forensics.shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr("oarsmith.atomic.require_space", lambda path, num_bytes: None)
    step = read_step(recorder(tmp_path / "run", tiny_decoder()).failure(FACTS, "because", BATCHES))
    assert step.report.weights == "left out: too little room"
    assert step.weights_dir is None


def test_one_document(tmp_path):
    alone = only_document(BATCHES, 1)
    (expected,) = batches_of([SAMPLES[1]], 1)
    assert same_batch(alone, expected)
    assert only_document(BATCHES, 2).where == ("random:2",)
    with pytest.raises(CheckpointError, match="no document 3") as error:
        only_document(BATCHES, 3)
    assert "0 to 2" in error.value.fix


def test_a_document_without_trained_tokens():
    (sample,) = random_samples((6,))
    sample.weights[:] = 0
    batches = batches_of([sample, SAMPLES[0]], 2)
    with pytest.raises(CheckpointError, match="no token of document 0 is trained"):
        only_document(batches, 0)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(CheckpointError, match=r"no report\.json here"):
        read_step(tmp_path)
    folder = recorder(tmp_path / "run", tiny_decoder()).failure(FACTS, "because", BATCHES)
    (folder / "report.json").write_text('{"step": "seven"}')
    with pytest.raises(CheckpointError, match="step: Input should be a valid integer"):
        read_step(folder)


def test_how_far_apart():
    assert differs_by(1.5, 1.5) is None
    assert differs_by(math.nan, math.nan) is None
    assert differs_by(math.inf, math.nan) == "inf now, nan then"
    assert differs_by(1.0, 1.001).endswith(": 0.001 apart, relatively")
