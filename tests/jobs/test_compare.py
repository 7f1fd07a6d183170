"""``oarsmith compare``: real runs on a tiny model; one table, one picture, nothing run twice."""

import json

import pytest

from oarsmith import cli
from oarsmith.config.compare import CompareConfig
from oarsmith.config.load import load_config
from oarsmith.errors import ConfigError
from oarsmith.jobs.compare import contestants_of
from oarsmith.jobs.compare_report import Outcome, draw, table
from tiny import write_rows, write_tiny_model


@pytest.fixture
def words(tmp_path):
    model, rows = write_tiny_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", 16)
    given = ["compare", str(model), str(rows), "--output_dir", str(tmp_path / "out"), "--max_length", "64"]
    return [*given, "--device", "cpu", "--eval_split_ratio", "0.2", "--max_steps", "3", "--logging_steps", "1"]


def outcome(name, loss, eval_loss=None, **more):
    evaluations = [] if eval_loss is None else [(10, eval_loss)]
    values = {
        "trained": 10,
        "total": 100,
        "peak_mb": 5.0,
        "tokens_per_second": 7.0,
        "step_seconds": 0.5,
        "seconds": 3.0,
    }
    return Outcome(name, [(1, 9.0), (10, loss)], evaluations, file_bytes=1000, **(values | more))


@pytest.mark.slow
def test_a_comparison(words, tmp_path, capsys):
    chosen = [*words, "--methods", "full,lora:lora_rank=2,lora:lora_rank=4:rslora=true", "--lora_dropout", "0.1"]
    assert cli.main(chosen) == 0
    printed = capsys.readouterr().out
    out = tmp_path / "out"
    found = json.loads((out / "compare.json").read_text())
    by_name = {one["name"]: one for one in found["methods"]}
    assert list(by_name) == ["full", "lora:lora_rank=2", "lora:lora_rank=4:rslora=true"]
    assert by_name["full"]["trained"] == by_name["full"]["total"]
    assert 2 * by_name["lora:lora_rank=2"]["trained"] == by_name["lora:lora_rank=4:rslora=true"]["trained"]
    for name, one in by_name.items():
        assert len(one["losses"]) == 3 and one["eval_loss"] > 0 and one["seconds"] > 0, name
        assert f"| {name} |" in printed and f"| {name} |" in (out / "compare.md").read_text()
        assert f"| {one['eval_loss']:.4f} |" in printed
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    settings = json.loads((out / "lora_lora_rank=4_rslora=true" / "run.json").read_text())
    assert (settings["lora_rank"], settings["rslora"], settings["lora_dropout"]) == (4, True, 0.1)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/report.html")}
    assert cli.main(chosen) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before, "finished runs are kept"
    # Other settings are another run, in the same folder.
    assert cli.main([*chosen, "--learning_rate", "1e-5"]) == 0
    assert all(path.stat().st_mtime_ns > time for path, time in before.items())


@pytest.mark.slow
def test_a_run_that_fails(words, tmp_path, capsys):
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no weights")
    assert cli.main([*words, "--methods", "full"]) == cli.EXIT_BAD_INPUT
    printed = capsys.readouterr().err
    assert "full: " in printed and "output.txt" in printed and "Traceback" not in printed
    assert cli.main([*words, "--methods", "full,lora", "--continue_on_error"]) == cli.EXIT_BAD_INPUT
    assert "no run ended well" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("methods", "part"),
    [
        ("full,full", "named twice"),
        ("lora:lora_rank", "not KEY=VALUE"),
        ("lora:lora_rank=x", "lora_rank"),
        ("nothing", "adapter_type"),
        ("full:lora_rank=3", "no effect"),
        ("lora:output_dir=x", "not KEY=VALUE"),
    ],
)
def test_mistakes_come_before_the_first_run(methods, part):
    resolved = load_config(CompareConfig, None, ["model", "data", "--methods", methods])
    with pytest.raises(ConfigError, match=part):
        contestants_of(resolved)


def test_the_best_comes_first():
    text = table([outcome("a", 2.0, 3.0), outcome("b", 5.0, 1.0), outcome("c", 1.5)])
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == ["b", "c", "a"]
    assert "10 (10.00%)" in text
    many = [outcome(f"method {n}", 1.0 + n / 10, peak_mb=float(n + 1)) for n in range(20)]
    assert draw(many, "twenty").startswith(b"\x89PNG")
