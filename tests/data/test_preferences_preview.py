"""``oarsmith preview`` of judged answers: what is predicted, and which answer is to become likelier."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from oarsmith import cli
from oarsmith.data.answer_preview import preview_answers
from oarsmith.data.answer_samples import AnswerOptions
from tiny import write_tiny_model

PAIR = {"src": ["[bold]Why?[/bold]"], "tgt": [], "response": ["No.", "Green \x1b[31m"], "sort": [0, 1], "margin": 0.5}
STEPS = {"prompt": "2+3?", "completions": ["Add.", "Six."], "labels": [1, 0]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("preview")
    write_tiny_model(place / "model")
    rows = {"pairs": [PAIR, {**PAIR, "src": ["And?"]}], "steps": [STEPS], "ties": [{**PAIR, "response": ["x", "x"]}]}
    for name, of in rows.items():
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, of)), encoding="utf-8")
    return place


def shown(folder, name, capsys, *words):
    assert cli.main(["preview", str(folder / "model"), str(folder / f"{name}.jsonl"), *words]) == 0
    return capsys.readouterr().out


def test_a_pair(folder, capsys):
    out = shown(folder, "pairs", capsys, "--count", "1")
    assert "[bold]Why?[/bold]" in out and "And?" not in out and "margin 0.5" in out
    assert "prompt, weight 0: <|im_start|>" in out and f"{folder / 'pairs.jsonl'}:1: " in out
    chosen, rejected = out.index("chosen, weight 1"), out.index("rejected, weight 1")
    assert chosen < out.index("Green ␛[31m<|im_end|>") < rejected < out.index("No.<|im_end|>")
    assert shown(folder, "pairs", capsys, "--count", "1", "--stage", "dpo") == out


def test_the_stage_decides(folder, capsys):
    out = shown(folder, "pairs", capsys, "--stage", "kto")
    assert out.count("another prompt's answer (KL), weight 1") == 3
    assert "undesirable, weight 1" in out and "1 x pairs taken" not in out
    steps = shown(folder, "steps", capsys)
    assert "Add.↵[1]" in steps and "Six.↵[0]" in steps
    assert shown(folder, "steps", capsys, "--stage", "reward") == steps
    assert cli.main(["preview", str(folder / "model"), str(folder / "steps.jsonl"), "--stage", "dpo"]) == 2
    assert "judged step by step, expected a pair" in capsys.readouterr().err


def test_what_is_left_out_is_named(folder, capsys):
    assert f"{folder / 'ties.jsonl'}:1: left out, the answers are the same" in shown(folder, "ties", capsys)


def test_limits_are_those_of_training(folder, capsys):
    out = shown(folder, "pairs", capsys, "--max_length", "30", "--max_prompt_len", "20", "--count", "1")
    assert "20 of the prompt (once)" in out and "cut at its beginning" in out


def test_only_what_is_predicted_is_coloured(folder, tokenizer):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=300)
    preview_answers(folder / "pairs.jsonl", tokenizer, AnswerOptions(), 1, console)
    green = [part.split("m", 1)[1] for part in out.getvalue().split("\x1b[") if part.startswith(("30;42", "30;102"))]
    red = [part.split("m", 1)[1] for part in out.getvalue().split("\x1b[") if part.startswith(("30;41", "30;101"))]
    assert "".join(green).startswith("Green ␛[31m<|im_end|>") and "".join(red).startswith("No.<|im_end|>")
