"""``oarsmith pretrain`` as a user runs it: from scratch, further, and what it refuses."""

import json

import numpy as np
import pytest
import torch

import oarsmith
from oarsmith import cli
from oarsmith.data.corpus.indexed import IndexedBuilder, token_dtype
from oarsmith.models import families
from tiny import CONFIGS, TOKENIZER, read_lines, write_tiny_model

KEYS = {"num_threads": 1, "dtype": "fp32", "max_length": 32, "per_device_train_batch_size": 2, "logging_steps": 1}


def write_corpus(prefix, *, documents=40, seed=0, vocab=1100, first=0):
    """Documents of 23 tokens that follow from each other, so that something is learned in a few steps."""
    generator = np.random.default_rng(seed)
    with IndexedBuilder(prefix, token_dtype(vocab)) as builder:
        for _ in range(documents):
            start, length = generator.integers(0, 50), generator.integers(20, 90)
            builder.add(first + (start + 7 * np.arange(length)) % 23)
            builder.end_document()
    return prefix


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture
def blank(tmp_path):
    """A directory of config and tokenizer only."""
    folder = tmp_path / "blank"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIGS["llama"] | {"vocab_size": 100}))
    oarsmith.load_tokenizer(TOKENIZER).save(folder)
    return folder


def pretrain(model, corpus, output_dir, **keys):
    words = [f"--{key}={value}" for key, value in {**KEYS, "output_dir": output_dir, **keys}.items()]
    return cli.main(["pretrain", str(model), str(corpus), *words])


def losses(folder):
    return [record["loss"] for record in read_lines(folder / "log.jsonl") if "loss" in record]


def test_from_scratch(blank, corpus, tmp_path, capsys):
    keys = {"max_steps": 30, "learning_rate": 3e-3, "eval_steps": 10, "split": "8,1,1", "do_predict": True}
    assert pretrain(blank, corpus, tmp_path / "run", **keys) == 0
    out = capsys.readouterr().out
    assert "fresh weights" in out and "test:   loss" in out
    learned = losses(tmp_path / "run")
    assert learned[0] == pytest.approx(np.log(1152), rel=0.02), "a fresh model gives every token the same chance"
    assert learned[-1] < 0.8 * learned[0]
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["vocab_size"] == 1152, "room for the tokenizer's 1,106 ids, in steps of 128"
    assert (tmp_path / "run" / "report.html").is_file()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["continue_training"] is False
    assert oarsmith.load_model(tmp_path / "run")(torch.tensor([[1, 2, 3]])).shape == (1, 3, 1152)


def test_the_context_grows_and_blocks_can_be_fewer(blank, corpus, tmp_path):
    keys = {"max_steps": 1, "max_length": 300, "num_hidden_layers": 1, "split": "1"}
    assert pretrain(blank, corpus, tmp_path / "run", **keys) == 0
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["num_hidden_layers"]) == (300, 1)


def test_further_from_weights(corpus, tmp_path):
    model = write_tiny_model(tmp_path / "model")
    assert pretrain(model, corpus, tmp_path / "run", max_steps=2, split="9,1") == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (run["continue_training"], run["learning_rate"]) == (True, 5e-5)
    assert pretrain(model, corpus, tmp_path / "anew", max_steps=1, split="9,1", continue_training=False) == 0
    assert losses(tmp_path / "anew")[0] != losses(tmp_path / "run")[0]


def test_epochs(blank, corpus, tmp_path):
    keys = {"num_train_epochs": 2, "split": "1", "gradient_accumulation_steps": 3}
    assert pretrain(blank, corpus, tmp_path / "run", **keys) == 0
    records = [record for record in read_lines(tmp_path / "run" / "log.jsonl") if "loss" in record]
    assert records[-1]["epoch"] == 2.0
    assert 1.0 in [record["epoch"] for record in records], "an update never spans two epochs"


def test_documents_apart_changes_what_is_seen(blank, corpus, tmp_path):
    for name, apart in (("apart", True), ("stream", False)):
        assert pretrain(blank, corpus, tmp_path / name, max_steps=2, split="1", isolate_documents=apart) == 0
    counts = [read_lines(tmp_path / name / "log.jsonl")[-1]["trained_tokens"] for name in ("apart", "stream")]
    assert counts[1] == 2 * 2 * 32, "every token of a stream is trained"
    assert counts[0] < counts[1], "the last token of a document does not predict the next one's first"


OPTIMIZERS = ["adamw", "adamw_8bit", "adamw_mini", "adafactor", "muon", "galore", "apollo", "apollo_mini"]


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_optimizer_learns_and_resumes_exactly(blank, corpus, tmp_path, optim):
    keys = {"optim": optim, "learning_rate": 3e-3, "split": "1", "weight_decay": 0.01}
    if optim in ("galore", "apollo"):
        keys |= {"projection_rank": 8, "projection_steps": 4}
    assert pretrain(blank, corpus, tmp_path / "whole", max_steps=12, save_steps=5, **keys) == 0
    learned = losses(tmp_path / "whole")
    assert learned[-1] < learned[0] - 0.3
    again = {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-5"}
    assert pretrain(blank, corpus, tmp_path / "again", max_steps=12, **keys, **again) == 0
    whole, resumed = (tmp_path / name / "model" / "model.safetensors" for name in ("whole", "again"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_updates_in_backward_are_those_after_it(blank, corpus, tmp_path):
    keys = {"max_steps": 4, "max_grad_norm": 0, "split": "1", "dtype": "fp32"}
    for name, flag in (("after", False), ("within", True)):
        assert pretrain(blank, corpus, tmp_path / name, optimizer_in_backward=flag, **keys) == 0
    after, within = (tmp_path / name / "model" / "model.safetensors" for name in ("after", "within"))
    assert after.read_bytes() == within.read_bytes()


def test_fp16_with_a_scale_that_overflows_first(blank, corpus, tmp_path, capsys):
    keys = {"max_steps": 20, "dtype": "fp16", "scale_loss": 2.0**30, "split": "1", "learning_rate": 3e-3}
    assert pretrain(blank, corpus, tmp_path / "run", **keys) == 0
    records = read_lines(tmp_path / "run" / "log.jsonl")
    assert any(record.get("event") == "skipped" for record in records)
    assert "skipped, gradients overflowed" in capsys.readouterr().out
    scales = [record["loss_scale"] for record in records if "loss" in record]
    assert scales[-1] < scales[0] == 2.0**30
    learned = losses(tmp_path / "run")
    assert learned[-1] < learned[0] - 0.1
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["torch_dtype"] == "float16"


def test_averaged_weights(blank, corpus, tmp_path):
    keys = {"max_steps": 6, "ema_decay": 0.9, "split": "9,1", "eval_steps": 3, "learning_rate": 3e-3}
    assert pretrain(blank, corpus, tmp_path / "run", save_steps=3, **keys) == 0
    last, average = (oarsmith.load_model(tmp_path / "run" / name) for name in ("model", "model-ema"))
    pairs = zip(last.parameters(), average.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in pairs)
    again = {"resume_from_checkpoint": tmp_path / "run" / "checkpoint-3"}
    assert pretrain(blank, corpus, tmp_path / "again", **keys, **again) == 0
    files = [tmp_path / name / "model-ema" / "model.safetensors" for name in ("run", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"continue_training": True}, "no weights to train further"),
        ({"split": "1", "max_length": 5000, "max_steps": 1}, "a sample 5,001"),
        ({"min_learning_rate": 1e-2}, "above the learning rate of 0.001"),
    ],
)
def test_refused(blank, corpus, tmp_path, capsys, keys, message):
    assert pretrain(blank, corpus, tmp_path / "run", **keys) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_corpus_of_another_tokenizer_is_refused(blank, tmp_path, capsys):
    strange = write_corpus(tmp_path / "strange", vocab=4000, first=3000)
    assert pretrain(blank, strange, tmp_path / "run", max_steps=1, split="1") == 2
    assert "outside the model's vocabulary of 1152" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["linear", "ntk", "dynamic", "yarn"])
def test_a_stretched_context_stays_with_the_model(corpus, tmp_path, kind):
    model = write_tiny_model(tmp_path / "model", max_position_embeddings=16)
    keys = {"rope_scaling_type": kind, "rope_scaling_factor": 4, "max_steps": 2, "split": "1", "use_pose_convert": True}
    assert pretrain(model, corpus, tmp_path / "run", **keys, max_length=16) == 0
    kept = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert families.build_spec(kept)[1].max_positions == 64
    # The same model, made anew from its files, is stretched in the same way.
    assert pretrain(tmp_path / "run" / "model", corpus, tmp_path / "more", max_steps=1, split="1", max_length=64) == 0


def test_rows_longer_than_the_context_are_refused(corpus, tmp_path, capsys):
    model = write_tiny_model(tmp_path / "model", max_position_embeddings=16)
    assert pretrain(model, corpus, tmp_path / "run", max_steps=1, split="1") == 2
    assert "max_length 32 is longer than the model's context of 16 tokens" in capsys.readouterr().err


def test_what_a_model_does_in_training_leaves_its_evaluation_alone(corpus, tmp_path):
    """Shifted attention, noise and recomputation change training (or nothing), never how a model is scored."""
    model = write_tiny_model(tmp_path / "model")
    base = {"max_steps": 1, "split": "9,1", "evaluation_strategy": "steps", "eval_steps": 1, "learning_rate": 1e-9}
    variants = {
        "plain": {},
        "shifted": {"use_ssa": True},
        "noise": {"neftune": True},
        "again": {"recompute": True, "recompute_granularity": "core_attn", "no_recompute_layers": "1"},
        "z": {"z_loss": 1e-3},
    }
    found = {}
    for name, keys in variants.items():
        assert pretrain(model, corpus, tmp_path / name, **base, **keys) == 0
        lines = read_lines(tmp_path / name / "log.jsonl")
        found[name] = (lines[0], next(line["eval_loss"] for line in lines if "eval_loss" in line))
    # A rate of 1e-9 moves no evaluation by more than this.
    assert all(value == pytest.approx(found["plain"][1], abs=1e-6) for _, value in found.values())
    first = {name: line["loss"] for name, (line, _) in found.items()}
    assert first["plain"] == first["again"] == first["z"]
    assert first["shifted"] != first["plain"] != first["noise"]
    assert found["z"][0]["z_loss"] > 0 and found["z"][0]["grad_norm"] != found["plain"][0]["grad_norm"]


def test_a_block_that_does_not_exist_cannot_be_spared(corpus, tmp_path, capsys):
    model = write_tiny_model(tmp_path / "model")
    keys = {"recompute": True, "no_recompute_layers": "0,7", "max_steps": 1, "split": "1"}
    assert pretrain(model, corpus, tmp_path / "run", **keys) == 2
    assert "[7]" in capsys.readouterr().err


@pytest.mark.parametrize("isolate", [False, True])
def test_a_model_with_prefixes_generates_the_text(corpus, tmp_path, isolate):
    """ChatGLM-6B: every row, or document, stands behind [gMASK] and the start token, in evaluations too."""
    config = json.loads((TOKENIZER.parents[1] / "families" / "chatglm_6b" / "config.json").read_text())
    folder = tmp_path / "blank"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    oarsmith.load_tokenizer(TOKENIZER).save(folder)
    keys = {"max_steps": 12, "learning_rate": 5e-3, "split": "8,2", "eval_steps": 12, "isolate_documents": isolate}
    assert pretrain(folder, corpus, tmp_path / "run", **keys) == 0
    learned = losses(tmp_path / "run")
    assert learned[-1] < learned[0] - 0.3
    records = read_lines(tmp_path / "run" / "log.jsonl")
    assert any(record.get("eval_loss", 9) < learned[0] - 0.3 for record in records)
    if not isolate:
        assert records[0]["tokens"] == 2 * (32 + 2) and records[0]["trained_tokens"] == 2 * (32 + 1)
