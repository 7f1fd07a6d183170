"""``oarsmith dpo`` and ``oarsmith kto`` on a tiny model: they learn what is preferred, and go on bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import oarsmith
from oarsmith import cli
from oarsmith.jobs import judged
from tiny import assert_same_run, interrupted, read_lines, write_tiny_model

KEYS = {"max_length": 96, "max_steps": 6, "learning_rate": 5e-3, "logging_steps": 1, "save_steps": 3, "device": "cpu"}
KEYS |= {"eval_split_ratio": 0.25, "report_to": "none", "disable_tqdm": True, "save_strategy": "steps"}


@pytest.fixture(autouse=True)
def _alone(few_threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """References are kept for this test alone."""
    monkeypatch.setattr("oarsmith.methods.reference.cache_directory", lambda: tmp_path / "cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("judged")
    write_tiny_model(place / "llama")
    rows = [
        {"src": [f"Say {n}."], "tgt": [], "response": [f"Yes, it is {n}.", "No, never that."], "sort": [1, 0]}
        for n in range(24)
    ]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def run(command: str, folder: Path, output_dir: Path, **more: Any) -> int:
    words = [command, str(folder / "llama"), str(folder / "pairs.jsonl"), "--output_dir", str(output_dir)]
    return cli.main([*words, *(f"--{key}={value}" for key, value in {**KEYS, **more}.items())])


def steps(output_dir: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(output_dir / "log.jsonl") if "loss" in line]


@pytest.mark.parametrize(
    "more",
    [
        {"lora": True, "lora_rank": 4},
        {},
        {"loss_type": "simpo"},
        {"loss_type": "sigmoid,sft", "loss_weights": "1,0.1", "lora": True, "use_dora": True},
        {"adapter_type": "prefix_tuning", "num_prefix_tokens": 3, "learning_rate": 0.1},
    ],
    ids=["lora", "full", "simpo", "mixed, dora", "prefix"],
)
def test_it_learns_and_goes_on(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: Any) -> None:
    first, again = tmp_path / "run", tmp_path / "again"
    assert run("dpo", folder, first, **more) == 0
    printed = capsys.readouterr().out
    simpo = more.get("loss_type") == "simpo"
    assert ("reference: 48 answers in" in printed) != simpo
    assert "report.html" in printed and f"oarsmith chat {first}" in printed
    assert ("oarsmith merge-adapter" in printed) == ("lora" in more)  # a prefix has no weights to merge into
    logged = steps(first)
    if not simpo and "adapter_type" not in more:  # the policy is its reference; a prefix does not start as the base
        assert logged[0]["margin"] == pytest.approx(0, abs=1e-9) and logged[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert logged[-1]["margin"] > logged[0]["margin"]
    assert logged[-1]["loss"] < logged[0]["loss"]
    evaluated = [line for line in read_lines(first / "log.jsonl") if "eval_loss" in line][-1]
    assert evaluated["eval_accuracy"] > 0.5 and "eval_perplexity" not in evaluated
    interrupted(first, again, "checkpoint-6")
    assert run("dpo", folder, again, **more) == 0
    assert ("kept from an earlier run" in capsys.readouterr().out) != simpo
    assert_same_run(first, again)


def test_the_reference_has_no_adapter(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A prefix changes answers from the start; its reference is the base, as that of all other methods."""
    assert run("dpo", folder, tmp_path / "prefix", adapter_type="prefix_tuning", num_prefix_tokens=3, dtype="fp32") == 0
    (file,) = (tmp_path / "cache" / "references").glob("*.npy")
    known = np.load(file)
    file.unlink()
    assert run("dpo", folder, tmp_path / "full", dtype="fp32", zero_padding=False) == 0
    assert "kept from an earlier run" not in capsys.readouterr().out
    (other,) = (tmp_path / "cache" / "references").glob("*.npy")
    assert np.allclose(np.load(other), known, atol=1e-3)


def test_splits_of_a_step_do_not_matter(folder: Path, tmp_path: Path) -> None:
    """One pass of two rows, or two passes of one; packed or not; a prompt once or for each answer."""
    found = []
    for name, more in (
        ("whole", {"per_device_train_batch_size": 24}),
        ("split", {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 4}),
    ):
        whole = {"zero_padding": False, "eval_split_ratio": 0, "max_steps": 2, **more}
        assert run("dpo", folder, tmp_path / name, dtype="fp32", loss_type="sigmoid,aot", **whole) == 0
        found.append(steps(tmp_path / name))
    for one, other in zip(*found, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5) and one["tokens"] == other["tokens"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_a_prompt_is_read_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("dpo", folder, tmp_path / "once", dtype="fp32", max_steps=2, zero_padding=False) == 0
    monkeypatch.setattr(judged, "shares_beginnings", lambda spec: False)
    assert run("dpo", folder, tmp_path / "twice", dtype="fp32", max_steps=2, zero_padding=False) == 0
    for one, other in zip(steps(tmp_path / "once"), steps(tmp_path / "twice"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5) and one["tokens"] < other["tokens"]


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], loss_type: str) -> None:
    """Pairs are two judged answers each."""
    keys = {"loss_type": loss_type, "lora": True, "gradient_accumulation_steps": 2}
    assert run("kto", folder, tmp_path / "run", **keys) == 0
    logged = steps(tmp_path / "run")
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert logged[-1]["rewards_chosen"] > logged[-1]["rewards_rejected"]
    answers = oarsmith.load_model(tmp_path / "run")(torch.arange(5, 20)[None])
    assert bool(torch.isfinite(answers).all())
    assert "reference:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"loss_type": "nothing"}, "there is no loss 'nothing'"),
        ({"loss_type": "sigmoid,ipo", "loss_weights": "1"}, "2 loss types and 1 weights"),
        ({"loss_type": "exo_pair"}, "label_smoothing"),
        ({"loss_type": "dpop", "f_divergence_type": "forward_kl"}, "f_divergence_type"),
        ({"use_ssa": True}, "use_ssa"),
        ({"ref_model_update_steps": 5, "loss_type": "simpo"}, "compares with no reference"),
        ({"ref_model_update_steps": 5, "ignore_data_skip": True}, "ignore_data_skip"),
        ({"beta": -1}, "beta"),
    ],
)
def test_what_cannot_be_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: Any, part: str
) -> None:
    assert run("dpo", folder, tmp_path / "run", **more) == cli.EXIT_BAD_INPUT
    printed = capsys.readouterr().err
    assert part in printed and "Traceback" not in printed and not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [{}, {"lora": True, "gradient_accumulation_steps": 2}], ids=["full", "lora"])
def test_a_reference_that_follows(folder: Path, tmp_path: Path, more: Any) -> None:
    """After an update the policy is its reference: margin and KL are 0 there, and the run goes on bit for bit."""
    first, again = tmp_path / "run", tmp_path / "again"
    keys = {"ref_model_update_steps": 2, "max_steps": 7, "save_steps": 3, "dtype": "fp32", **more}
    assert run("dpo", folder, first, **keys) == 0
    logged = steps(first)
    for at in (0, 2, 4, 6):
        assert logged[at]["margin"] == pytest.approx(0, abs=1e-5) and logged[at]["kl"] == pytest.approx(0, abs=1e-4)
        assert logged[at]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert all(logged[at]["margin"] > 1e-3 for at in (1, 3, 5))
    evaluated = [line for line in read_lines(first / "log.jsonl") if "eval_loss" in line]
    assert evaluated[-1]["eval_margin"] > max(line["margin"] for line in logged)  # with the model of the beginning
    fixed = tmp_path / "fixed"
    assert run("dpo", folder, fixed, **{**keys, "ref_model_update_steps": -1}) == 0
    assert steps(fixed)[:2] == logged[:2] and steps(fixed)[2]["loss"] != logged[2]["loss"]
    for kept in (3, 6):  # in the midst of two updates, and at one
        interrupted(
            first, again, *(path.name for path in first.glob("checkpoint-*") if path.name > f"checkpoint-{kept}")
        )
        assert run("dpo", folder, again, **keys) == 0
        assert_same_run(first, again)
        shutil.rmtree(again)
