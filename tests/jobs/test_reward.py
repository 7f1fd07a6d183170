"""``oarsmith reward`` on tiny models: they learn what is better, and their files are transformers' and PEFT's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification

import oarsmith
from oarsmith import cli
from oarsmith.data.answer_samples import AnswerOptions
from oarsmith.data.answer_sets import build_answers
from oarsmith.data.answers import Answered
from oarsmith.engine.scoring import score_rows
from oarsmith.errors import OarsmithError
from oarsmith.jobs import judged
from oarsmith.jobs.eval_scores import wilson
from oarsmith.models.decoder import Decoder
from tiny import assert_same_run, interrupted, read_lines, weights_folder, write_tiny_model

KEYS = {"max_length": 96, "max_steps": 6, "learning_rate": 5e-3, "logging_steps": 1, "save_steps": 3, "device": "cpu"}
KEYS |= {"eval_split_ratio": 0.25, "report_to": "none", "disable_tqdm": True, "save_strategy": "steps"}


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny matrices."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("reward")
    for family in ("llama", "gpt2", "qwen2"):
        write_tiny_model(place / family, family)
    rows = [
        {"src": [f"Say {n}."], "tgt": [], "response": [f"Yes, it is {n}.", "No, never that."], "sort": [1, 0]}
        for n in range(24)
    ]
    steps = [
        {
            "prompt": f"Count to {n}.",
            "completions": [f"{n} is here.", "Bad, no.", "It is done."],
            "labels": [1, 0, True],
        }
        for n in range(24)
    ]
    (place / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def run(folder: Path, output_dir: Path, *, model: str = "llama", data: str = "pairs", **more: Any) -> int:
    words = ["reward", str(folder / model), str(folder / f"{data}.jsonl"), "--output_dir", str(output_dir)]
    return cli.main([*words, *(f"--{key}={value}" for key, value in {**KEYS, **more}.items())])


def steps(output_dir: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(output_dir / "log.jsonl") if "loss" in line]


def rows_of(folder: Path) -> Sequence[Answered]:
    tokenizer = oarsmith.load_tokenizer(folder / "llama")
    return build_answers(folder / "pairs.jsonl", tokenizer, AnswerOptions()).rows[:6]


def ours(model: Decoder, rows: Sequence[Answered]) -> list[float]:
    return [score for scores in score_rows(model, rows) for score in scores]


@torch.no_grad()
def theirs(model: Any, rows: Sequence[Answered], pad: int) -> list[float]:
    """A batch padded on the right; under virtual tokens, where transformers sees no padding, one after the other."""
    if isinstance(model, peft.PeftModel) and model.peft_config["default"].is_prompt_learning:
        parts = [replace(row, answers=(answer,)) for row in rows for answer in row.answers]
        if len(parts) > 1:
            return [score for part in parts for score in theirs(model, [part], pad)]
    texts = [np.concatenate([row.prompt, answer]) for row in rows for answer in row.answers]
    size = max(map(len, texts))
    ids = torch.full((len(texts), size), pad)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.from_numpy(text)
    return model.eval()(ids, attention_mask=(ids != pad).long()).logits[:, 0].tolist()


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"lora": True, "lora_rank": 4},
        {"lora": True, "use_dora": True, "loss_type": "token-wise", "center_rewards_coefficient": 0.01},
        {"lora": True, "weight_quantize_algo": "nf4", "regularization": 0.001},
        {"adapter_type": "prefix_tuning", "num_prefix_tokens": 3, "learning_rate": 0.1},
        {"adapter_type": "ia3", "learning_rate": 0.05},
    ],
    ids=["full", "lora", "dora, token-wise", "qlora", "prefix", "ia3"],
)
def test_it_learns_and_goes_on(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: Any) -> None:
    first, again = tmp_path / "run", tmp_path / "again"
    assert run(folder, first, **more) == 0
    printed = capsys.readouterr().out
    assert f"oarsmith eval {first}" in printed and f"oarsmith serve {first}" in printed and "chat" not in printed
    assert ("oarsmith merge-adapter" in printed) == ("lora" in more or more.get("adapter_type") == "ia3")
    logged = steps(first)
    assert logged[-1]["margin"] > logged[0]["margin"] and logged[-1]["loss"] < logged[0]["loss"]
    assert logged[-1]["margin"] == pytest.approx(logged[-1]["rewards_chosen"] - logged[-1]["rewards_rejected"])
    evaluated = [line for line in read_lines(first / "log.jsonl") if "eval_loss" in line][-1]
    assert evaluated["eval_accuracy"] > 0.5 and "eval_perplexity" not in evaluated
    interrupted(first, again, "checkpoint-6")
    assert run(folder, again, **more) == 0
    assert_same_run(first, again)
    model = oarsmith.load_model(first)
    assert model.spec.head.num_scores == 1
    values = ours(model, rows_of(folder))
    assert np.mean(values[0::2]) > np.mean(values[1::2])


def test_splits_of_a_step_do_not_matter(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass of all rows or four of some; packed or not; a prompt once or for each answer."""
    found = []
    for name, more, share in (
        ("whole", {"per_device_train_batch_size": 24}, True),
        ("split", {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 4}, True),
        ("twice", {"per_device_train_batch_size": 24}, False),
    ):
        if not share:
            monkeypatch.setattr(judged, "shares_beginnings", lambda spec: False)
        keys = {"zero_padding": False, "eval_split_ratio": 0, "max_steps": 2, "dtype": "fp32", **more}
        assert run(folder, tmp_path / name, **keys) == 0
        found.append(steps(tmp_path / name))
    for one, split, twice in zip(*found, strict=True):
        assert one["loss"] == pytest.approx(split["loss"], rel=1e-5) and one["tokens"] == split["tokens"]
        assert one["loss"] == pytest.approx(twice["loss"], rel=1e-5) and one["tokens"] < twice["tokens"]
        assert one["grad_norm"] == pytest.approx(split["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_transformers_reads_it(folder: Path, tmp_path: Path, family: str) -> None:
    """And gives the same scores in a padded batch; what it saves we read bit for bit, and it trains further."""
    assert run(folder, tmp_path / "run", model=family, max_steps=2, dtype="fp32") == 0
    place, rows = tmp_path / "run" / "model", rows_of(folder)
    config = json.loads((place / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification") and len(config["id2label"]) == 1
    assert {name for name in load_file(place / "model.safetensors") if "score" in name} == {"score.weight"}
    model = AutoModelForSequenceClassification.from_pretrained(place)
    assert model.config.num_labels == 1
    pad = model.config.pad_token_id
    assert pad is not None and pad not in {int(answer[-1]) for row in rows for answer in row.answers}
    expected = theirs(model, rows, pad)
    assert ours(oarsmith.load_model(place), rows) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    model.save_pretrained(tmp_path / "saved")
    own = oarsmith.load_model(tmp_path / "saved")
    assert ours(own, rows) == ours(oarsmith.load_model(place), rows)
    shutil.copytree(place, tmp_path / "further")
    model.save_pretrained(tmp_path / "further")
    assert run(tmp_path, tmp_path / "second", model="further", data="pairs", max_steps=1) != 0  # no rows there
    shutil.copy(folder / "pairs.jsonl", tmp_path / "pairs.jsonl")
    assert run(tmp_path, tmp_path / "second", model="further", max_steps=1, learning_rate=1e-9, dtype="fp32") == 0
    assert ours(oarsmith.load_model(tmp_path / "second"), rows) == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("more", [{"lora": True}, {"adapter_type": "prompt_tuning"}])
def test_peft_reads_it(folder: Path, tmp_path: Path, more: Any) -> None:
    assert run(folder, tmp_path / "run", max_steps=3, dtype="fp32", **more) == 0
    place, rows = tmp_path / "run" / "adapter", rows_of(folder)
    saved = json.loads((place / "adapter_config.json").read_text())
    assert saved["task_type"] == "SEQ_CLS" and saved["modules_to_save"] == ["score"]
    base = AutoModelForSequenceClassification.from_pretrained(folder / "llama", num_labels=1, pad_token_id=1)
    model = peft.PeftModel.from_pretrained(base, str(place))
    expected = theirs(model, rows, 1)
    values = ours(oarsmith.load_model(place), rows)
    assert values == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert values == ours(oarsmith.load_model(folder / "llama", adapter=place), rows)
    if "lora" in more:
        assert cli.main(["merge-adapter", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
        assert ours(oarsmith.load_model(tmp_path / "merged"), rows) == pytest.approx(expected, rel=1e-3, abs=1e-4)
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
        assert plain.config.pad_token_id is not None
        assert theirs(plain, rows, plain.config.pad_token_id) == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    "made",
    [
        peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules="all-linear", init_lora_weights=False),
        peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    ],
    ids=["lora", "prompt"],
)
def test_peft_s_are_read(folder: Path, tmp_path: Path, made: Any) -> None:
    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(folder / "llama", num_labels=1, pad_token_id=1)
    base = AutoModelForSequenceClassification.from_pretrained(folder / "llama", config=config)
    model = peft.get_peft_model(base, made)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "score" in name or "prompt" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "theirs")
    rows = rows_of(folder)
    expected = theirs(model, rows, 1)
    found = ours(oarsmith.load_model(folder / "llama", adapter=tmp_path / "theirs"), rows)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_an_adapter_on_a_reward_model(folder: Path, tmp_path: Path) -> None:
    """The base's head goes on; transformers and PEFT give the same scores of base and adapter."""
    assert run(folder, tmp_path / "first", max_steps=3, dtype="fp32") == 0
    rows, base = rows_of(folder), tmp_path / "first" / "model"
    begun = ours(oarsmith.load_model(base), rows)
    shutil.copy(folder / "pairs.jsonl", tmp_path / "pairs.jsonl")
    keys = {"model": "first/model", "lora": True, "dtype": "fp32", "max_steps": 1}
    assert run(tmp_path, tmp_path / "still", **keys, learning_rate=1e-12) == 0
    assert ours(oarsmith.load_model(tmp_path / "still"), rows) == pytest.approx(begun, abs=1e-5)
    assert run(tmp_path, tmp_path / "second", **keys) == 0
    found = ours(oarsmith.load_model(tmp_path / "second"), rows)
    assert found != pytest.approx(begun, abs=1e-4)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    pad = model.config.pad_token_id
    model = peft.PeftModel.from_pretrained(model, str(tmp_path / "second" / "adapter"))
    assert found == pytest.approx(theirs(model, rows, pad), rel=1e-4, abs=1e-5)


def test_scores_lie_beside_no_logits(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other commands say what a reward model is."""
    assert run(folder, tmp_path / "run", max_steps=1) == 0
    for words in (
        ["sft", str(tmp_path / "run"), str(folder / "pairs.jsonl")],
        ["dpo", str(tmp_path / "run"), str(folder / "pairs.jsonl")],
    ):
        assert cli.main([*words, "--output_dir", str(tmp_path / "other")]) == cli.EXIT_BAD_INPUT
        printed = capsys.readouterr().err
        assert "writes no text" in printed and "Traceback" not in printed


def test_eval_and_the_engine_score(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Held-out accuracy with its interval, scores in the order of the rows, conversations as training reads them."""
    assert run(folder, tmp_path / "run", dtype="fp32", eval_split_ratio=0) == 0
    capsys.readouterr()
    numbers, file = tmp_path / "numbers.json", tmp_path / "scores.jsonl"
    words = ["eval", str(tmp_path / "run"), str(folder / "pairs.jsonl"), "--dtype", "fp32"]
    assert cli.main([*words, "--output_file", str(numbers), "--scores_file", str(file)]) == 0
    found, scores = json.loads(numbers.read_text()), read_lines(file)
    tokenizer = oarsmith.load_tokenizer(folder / "llama")
    rows = build_answers(folder / "pairs.jsonl", tokenizer, AnswerOptions()).rows
    engine = oarsmith.Engine(tmp_path / "run", num_threads=1)
    expected = ours(engine.model, rows)
    assert [s for line in scores for s in (line["chosen"], line["rejected"])] == pytest.approx(expected, abs=1e-5)
    assert [line["where"] for line in scores] == [row.where for row in rows]
    share = np.mean([line["chosen"] > line["rejected"] for line in scores])
    assert found["accuracy"] == pytest.approx(share) and found["num_pairs"] == 24
    assert found["accuracy_low"] < share <= found["accuracy_high"]
    assert f"accuracy {share:.2%} on 24 pairs (95 % confidence interval" in capsys.readouterr().out
    asked = [{"role": "user", "content": "Say 3."}]
    said = [[*asked, {"role": "assistant", "content": text}] for text in ("Yes, it is 3.", "No, never that.")]
    assert engine.score(said) == pytest.approx(expected[6:8], abs=1e-5)
    ids = [*rows[3].prompt.tolist(), *rows[3].answers[0].tolist()]
    assert engine.score(ids) == pytest.approx(expected[6:7], abs=1e-5)
    for wrong, part in (
        (asked, "where the assistant should speak"),
        ([], "fewer than two tokens"),
        ([5] * 300, "more than the model's context of 256"),
        ([5, 5000], "outside the model's vocabulary"),
    ):
        with pytest.raises(OarsmithError, match=part):
            engine.score([wrong])
    with pytest.raises(OarsmithError, match="reward model: it scores answers"):
        engine.generate("Say 3.")
    with pytest.raises(OarsmithError, match="a reward model writes no tokens"):
        oarsmith.Engine(folder / "llama", num_threads=1, speculative=tmp_path / "run")
    rounded = oarsmith.Engine(tmp_path / "run", num_threads=1, weights="int8")
    assert rounded.score(said) == pytest.approx(expected[6:8], abs=0.05)
    assert rounded.model.head.weight is not None and engine.model.head.weight is not None
    assert torch.equal(rounded.model.head.weight, engine.model.head.weight)
    with pytest.raises(OarsmithError, match="writes text and gives no scores"):
        oarsmith.Engine(folder / "llama", num_threads=1).score(said)


def test_wilson() -> None:
    """Newcombe 1998, table I; and what the normal interval gets wrong: a share of 1."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    low, high = wilson(10, 10)
    assert 0.7 < low < 0.75 and high == pytest.approx(1)


def test_eval_of_single_answers(folder: Path, tmp_path: Path) -> None:
    """Judged or not, in any format."""
    assert run(folder, tmp_path / "run", max_steps=1) == 0
    rows = [
        {"prompt": "Say 1.", "completion": "Yes.", "label": True},
        {"src": "Say 2.", "tgt": "No."},
        {"prompt": "Say 3.", "completion": "Yes."},
        {"messages": [{"role": "user", "content": "Say 4."}, {"role": "assistant", "content": "No."}]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["eval", str(tmp_path / "run"), str(tmp_path / "rows.jsonl"), "--output_file", str(tmp_path / "n.json")]
    assert cli.main([*words, "--scores_file", str(tmp_path / "s.jsonl")]) == 0
    scores, found = read_lines(tmp_path / "s.jsonl"), json.loads((tmp_path / "n.json").read_text())
    assert found["score_good"] == scores[0]["score"]
    assert found["score_not_judged"] == pytest.approx(np.mean([line["score"] for line in scores[1:]]))


@pytest.mark.parametrize("model", ["reward", "plain"])
def test_what_has_no_scores_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "a text"}\n')
    if model == "plain":
        words = ["eval", str(folder / "llama"), str(tmp_path / "text.jsonl"), "--scores_file", str(tmp_path / "s")]
        cases = [(words, "gives no scores")]
    else:
        assert run(folder, tmp_path / "run", max_steps=1) == 0
        capsys.readouterr()
        cases = [
            (["eval", str(tmp_path / "run"), str(tmp_path / "text.jsonl")], "the row is a text"),
            (["eval", str(tmp_path / "run"), "--tasks", "anything"], "tasks, generation and windows are not for it"),
            (["eval", str(tmp_path / "run"), str(tmp_path / "text.jsonl"), "--process_reward"], "whole answers"),
            (["generate", str(tmp_path / "run"), "Say 3."], "it scores answers and writes none"),
        ]
    for words, part in cases:
        assert cli.main(words) == cli.EXIT_BAD_INPUT
        printed = capsys.readouterr().err
        assert part in printed and "Traceback" not in printed, printed


STEPS: dict[str, Any] = {"data": "steps", "process_reward": True, "reward_tokens": "+,-", "placeholder_token": "ки"}


@pytest.mark.parametrize("more", [{}, {"lora": True, "weight_quantize_algo": "nf4"}], ids=["full", "qlora"])
def test_judged_steps(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: Any) -> None:
    """The model stays one that writes; what it makes of steps is what the softmax of two tokens says."""
    first, again = tmp_path / "run", tmp_path / "again"
    keys = {**STEPS, "max_steps": 12, "save_steps": 6, "learning_rate": 1e-2, **more}
    assert run(folder, first, **keys) == 0
    printed = capsys.readouterr().out.replace("'", "").split("\n")
    assert f"        oarsmith serve {first} --process_reward --step_separator ки" in printed
    logged = steps(first)
    assert logged[-1]["loss"] < logged[0]["loss"]
    interrupted(first, again, "checkpoint-12")
    assert run(folder, again, **keys) == 0
    assert_same_run(first, again)
    words = ["eval", str(first), str(folder / "steps.jsonl"), "--process_reward", "--placeholder_token", "ки"]
    written = ["--output_file", str(tmp_path / "n.json"), "--scores_file", str(tmp_path / "s.jsonl"), "--dtype", "fp32"]
    assert cli.main([*words, *written]) == 0
    found, scores = json.loads((tmp_path / "n.json").read_text()), read_lines(tmp_path / "s.jsonl")
    assert found["accuracy"] > 0.6 and found["num_steps"] == 72
    assert found["accuracy"] == np.mean(
        [(p > 0.5) == (at != 1) for line in scores for at, p in enumerate(line["steps"])]
    )
    tokenizer, model = oarsmith.load_tokenizer(first / weights_folder(first)), oarsmith.load_model(first, dtype="fp32")
    good, bad = (tokenizer.encode(word)[0] for word in "+-")
    row = build_answers(folder / "steps.jsonl", tokenizer, AnswerOptions(kind="steps", step_separator="ки")).rows[0]
    with torch.no_grad():
        logits = model(torch.tensor([[*row.prompt.tolist(), *row.answers[0].tolist()]]))[0].double()
    ends = [len(row.prompt) + end for end in row.step_ends]
    expected = (logits[ends, good] - logits[ends, bad]).sigmoid().tolist()
    assert scores[0]["steps"] == pytest.approx(expected, abs=1e-5)


def test_splits_of_judged_steps_do_not_matter(folder: Path, tmp_path: Path) -> None:
    found = []
    for name, more in (
        ("whole", {"per_device_train_batch_size": 24}),
        ("split", {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 4}),
    ):
        keys = {**STEPS, "zero_padding": False, "eval_split_ratio": 0, "max_steps": 2, "dtype": "fp32", **more}
        assert run(folder, tmp_path / name, **keys) == 0
        found.append(steps(tmp_path / name))
    for one, other in zip(*found, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ({"process_reward": True, "reward_tokens": "+"}, "two different tokens"),
        ({"process_reward": True, "reward_tokens": "+,+"}, "two different tokens"),
        ({"process_reward": True, "reward_tokens": "good day,-"}, "tokens, not one"),
        ({"process_reward": True}, "such rows are for oarsmith dpo and oarsmith reward"),
        ({"data": "steps"}, "oarsmith reward with process_reward true"),
        ({"loss_type": "sigmoid"}, "sequence-wise"),
        ({"normalize_score_during_training": True}, "not built yet"),
        ({"regularization": -1}, "regularization"),
    ],
)
def test_what_cannot_be_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: Any, part: str
) -> None:
    assert run(folder, tmp_path / "run", **more) == cli.EXIT_BAD_INPUT
    printed = capsys.readouterr().err
    assert part in printed and "Traceback" not in printed


def test_preview(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["preview", str(folder / "llama"), str(folder / "pairs.jsonl"), "--stage", "reward"]) == 0
    assert "chosen" in capsys.readouterr().out
    assert cli.main(["preview", str(folder / "llama"), str(folder / "steps.jsonl"), "--stage", "reward"]) == 0
    assert "answer in judged steps" in capsys.readouterr().out
