"""The report page: whole, self-contained, and not fooled by what the data says."""

import json
import math
import struct
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import pytest

from oarsmith.adapters.merge import MergeProof
from oarsmith.config.load import load_config
from oarsmith.config.sft import SftConfig
from oarsmith.data.report import DataReport
from oarsmith.errors import TrainingError
from oarsmith.training.environment import describe_environment
from oarsmith.training.evaluate import Evaluation
from oarsmith.training.log import RunLog
from oarsmith.training.numbers import show_duration, show_percent, show_rough, show_small
from oarsmith.training.plots import running_mean
from oarsmith.training.report import write_report
from oarsmith.training.run_folder import RUN_FILE

VOID = {"meta", "link", "img", "br", "hr", "input"}
NASTY = (
    "</td></table></style><script>alert(1)</script>\"'><img src=x onerror=alert(1)> {{ 7 * 7 }} {% raw %} "
    "$\\frac{1}{0}$ &lt;b&gt; \u202etfel \ud800 \x00\x1b[31m 你好"
)
# As a reader of the page gets it: no control characters, no half of a surrogate pair.
NASTY_SHOWN = NASTY.replace("\ud800", "?").replace("\x00", "\ufffd").replace("\x1b", "\ufffd")


class Page(HTMLParser):
    """Tags, text and attributes of a page; every element must be closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.links, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        assert not [name for name, _ in attributes if name.startswith("on")], "no scripts in attributes"
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def make_run(folder, num_steps, every, eval_every=0):
    log, tokens = RunLog(folder), 0
    for step in range(1, num_steps + 1):
        tokens += 1000
        if step % every == 0 or step in (1, num_steps):
            loss = 0.5 + 3 * math.exp(-5 * step / num_steps)
            log.append(
                {
                    "step": step,
                    "epoch": 2 * step / num_steps,
                    "loss": loss,
                    "accuracy": 0.5,
                    "grad_norm": 1 + 1 / step,
                    "learning_rate": 1e-4 * (1 - step / num_steps),
                    "tokens": tokens,
                    "trained_tokens": 0.4 * tokens,
                }
            )
        if step % every == 0 or step == num_steps:
            log.append_timing({"step": step, "tokens_per_second": 500.0, "peak_memory_mb": 1536.0})
        if eval_every and step % eval_every == 0:
            log.append({"step": step, **Evaluation(1.0, 0.8, 100.0).record()})


def read_page(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.tags.count("img") == 1
    assert all(link.startswith("data:") for link in page.links), "nothing comes from elsewhere"
    picture = (folder / "loss.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", picture[16:24])
    assert width == 1800 and height > 600
    assert len(picture) > 10_000, "not blank"
    assert sorted(path.name for path in folder.glob(".*")) == [], "no temporary file is left"
    return page


@pytest.mark.parametrize(("num_steps", "every", "eval_every"), [(1, 1, 0), (7, 3, 3), (1500, 5, 100)])
def test_few_and_many_records(tmp_path, num_steps, every, eval_every):
    make_run(tmp_path, num_steps, every, eval_every)
    words = read_page(tmp_path).words
    assert f"Tokens trained {400 * num_steps:,} of {1000 * num_steps:,} tokens read" in words
    assert "Tokens per second 500" in words
    assert "Peak memory 1.50 GiB" in words
    assert f"Duration {show_duration(2 * num_steps)}" in words, "1000 tokens a step at 500 a second"
    assert f"Training loss {0.5 + 3 * math.exp(-5):.4f}" in words
    assert ("perplexity 2.72" in words) == bool(eval_every)
    assert f"{num_steps:,} optimizer step" in words
    assert "Configuration" not in words and "Merge" not in words and "Data" not in words


def test_speed_events_and_generated_answers(tmp_path):
    make_run(tmp_path, 7, 3)
    before = read_page(tmp_path)
    without = (tmp_path / "loss.png").read_bytes()
    assert "Events" not in before.words and "MFU" not in before.words and "BLEU-4" not in before.words
    log = RunLog(tmp_path)
    for step, share in ((8, 0.41), (9, 0.52), (10, 0.55)):
        log.append_timing({"step": step, "tokens_per_second": 500.0, "mfu": share, "peak_memory_mb": 1536.0})
    log.append({"step": 5, "event": "spike", "detail": f"the loss is 9; kept in {NASTY}"})
    log.append({"step": 6, "event": "skipped", "detail": "gradients overflowed at a loss scale of 32768"})
    log.append({"step": 7, **Evaluation(1.0, 0.8, 100.0).record()})
    log.append({"step": 7, **Evaluation(1.0, 0.8, 100.0).record(), "eval_bleu4": 0.25, "eval_rougel": 0.5})
    words = read_page(tmp_path).words
    assert "MFU 52% median, of the measured matrix product rate" in words
    assert "5 spike the loss is 9; kept in" in words and " ".join(NASTY_SHOWN.split()) in words
    assert "6 skipped gradients overflowed at a loss scale of 32768" in words
    assert "Tokens predicted right BLEU-4 ROUGE-L 7 1.0000 2.72 80.0 % – – 7 1.0000 2.72 80.0 % 0.2500 0.5000" in words
    assert "ROUGE-1" not in words, "nothing measured it"
    assert (tmp_path / "loss.png").read_bytes() != without, "the picture marks them"


def test_many_events_are_cut(tmp_path):
    make_run(tmp_path, 7, 3)
    for step in range(60):
        RunLog(tmp_path).append({"step": step, "event": "skipped", "detail": "overflow"})
    assert "The first 50 of 60; all are in log.jsonl." in read_page(tmp_path).words


def test_evaluation_only(tmp_path):
    RunLog(tmp_path).append({"step": 0, **Evaluation(2.0, 0.5, 10.0).record()})
    words = read_page(tmp_path).words
    assert "Evaluation loss 2.0000 perplexity 7.39, 50.0 % of tokens right" in words
    assert "Training loss" not in words


def test_a_log_without_records(tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    assert "Nothing has been logged" in read_page(tmp_path).words


def test_values_that_are_not_numbers(tmp_path):
    log = RunLog(tmp_path)
    for step, loss in enumerate([math.nan, 900.0, math.inf, 1.0, math.nan, 0.9], start=1):
        log.append({"step": step, "loss": loss, "grad_norm": math.nan, "learning_rate": 0.0, "epoch": 1.0})
    log.append({"step": 6, **Evaluation(math.inf, 0.0, 1.0).record()})
    log.append_timing({"step": 6, "tokens_per_second": math.nan, "peak_memory_mb": 100.0})
    words = read_page(tmp_path).words
    assert "Training loss 0.9000 from nan at step 1" in words
    assert "Evaluation loss inf" in words
    assert "Peak memory 100 MiB" in words
    assert "Duration" not in words


def test_a_line_cut_off_by_a_kill(tmp_path):
    make_run(tmp_path, 4, 1)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert "4 optimizer steps" in read_page(tmp_path).words


def write_all_parts(folder, text):
    """Every part a run can have, with ``text`` wherever it can hold some."""
    load_config(SftConfig, None, ["models/m", text, "--lora", "--seed", "7"]).save(folder / RUN_FILE)
    report = DataReport(text, 64, rows=3)
    report.drop(text, text, "why")
    report.drop("too long", "d.jsonl:3", "")
    report.malformed.add(text)
    report.notes[text] = 2
    parts = {
        "data_report": {"train": report.to_dict(), text: report.to_dict()},
        "environment": {**describe_environment(), text: text, "nested": {"a": [text]}},
        "merge_proof": asdict(MergeProof(0.03, 2e-6, 4e-5, 0.998, 0.7, 1000)),
        "answers": {
            "before": {"right": 0, "total": 1, "perplexity": 20.0},
            "after": {"right": 1, "total": 1, "perplexity": 20.5},
            "rows": [
                {"question": text, "before": text, "after": "new\nline", "before_right": False, "after_right": True}
            ],
        },
    }
    for name, part in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(part))


def test_every_part_in_words(tmp_path):
    make_run(tmp_path, 10, 1, 5)
    write_all_parts(tmp_path, "plain")
    page = read_page(tmp_path)
    words = page.words
    assert "".join(page.text).strip().startswith("m on plain")
    assert "oarsmith sft, LoRA of rank 8 · 10 optimizer steps · 2 epochs" in words
    assert "0 of 1 before, 1 of 1 after. Perplexity on unrelated text: 20.00 before, 20.50 after (+2.5 %)." in words
    assert "plain ✗ wrong plain ✓ right new line" in words
    assert "compared with the adapted one at 1,000 token positions" in words
    assert "No logit differs by more than 0.03 . Both find the same token most likely at all but 2 of them." in words
    assert "2 × 10⁻⁶" in words or "2.0 × 10⁻⁶" in words
    assert "training moved the model by 0.7 nats, about 350,000 times as far." in words
    assert "Training too long 1 d.jsonl:3" in words
    assert "Training malformed 1 plain" in words
    assert f"PyTorch {describe_environment()['torch']}" in words


def test_given_keys_come_before_defaults(tmp_path):
    make_run(tmp_path, 2, 1)
    write_all_parts(tmp_path, "plain")
    words = read_page(tmp_path).words
    given, _, rest = words.partition("more keys, derived or at their defaults")
    assert "seed 7 command line" in given and "lora true command line" in given
    assert "weight_decay" not in given
    assert rest.index("lora_alpha 16.0 derived") < rest.index("weight_decay 0.0 default")


def test_a_replayed_run_has_the_same_given_keys(tmp_path):
    make_run(tmp_path, 2, 1)
    load_config(SftConfig, None, ["m", "d", "--seed", "7"]).save(tmp_path / "default.json")
    load_config(SftConfig, tmp_path / "default.json").save(tmp_path / RUN_FILE)
    given = read_page(tmp_path).words.partition("more keys")[0]
    assert "seed 7" in given and "weight_decay" not in given


def test_hostile_text_stays_text(tmp_path):
    make_run(tmp_path, 3, 1)
    write_all_parts(tmp_path, NASTY.replace("\ud800", ""))  # a configuration file is UTF-8
    answers = json.loads((tmp_path / "answers.json").read_text())
    answers["rows"][0]["question"] = NASTY
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    page = read_page(tmp_path)
    text = "".join(page.text)
    assert text.count(NASTY_SHOWN) == 1
    assert text.count(NASTY_SHOWN.replace("?", "")) > 8


def test_one_data_report_without_a_name(tmp_path):
    make_run(tmp_path, 2, 1)
    report = DataReport("d.jsonl", 64, rows=1, kept=1, num_samples=1, num_tokens=10, num_trained=4)
    (tmp_path / "data_report.json").write_text(json.dumps(report.to_dict()))
    words = read_page(tmp_path).words
    assert "Tokens that are trained 4 (40%)" in words
    assert "No row was left out." in words


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("log.jsonl", '{"step": 1, "loss": "high"}\n', "0.loss"),
        ("log.jsonl", "{\n", "not valid JSON"),
        ("answers.json", "{}", "before"),
        ("answers.json", "\udcff", "not valid JSON"),
        ("merge_proof.json", '{"max_logit_diff": 1}', "mean_kl"),
        ("data_report.json", "[]", "dict"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, text, told):
    make_run(tmp_path, 2, 1)
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(TrainingError, match=told) as caught:
        write_report(tmp_path)
    assert caught.value.where == str(tmp_path / name)
    assert not (tmp_path / "report.html").exists()


def test_no_log_no_report(tmp_path):
    with pytest.raises(TrainingError, match=r"no log\.jsonl"):
        write_report(tmp_path)


def test_the_same_run_gives_the_same_files(tmp_path):
    make_run(tmp_path, 20, 1, 5)
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_running_mean():
    y = np.array([8.0, 4.0, np.nan, 2.0, 6.0])
    # Windows of one to each side; the first shrinks to itself, the last is cut off.
    np.testing.assert_allclose(running_mean(y), [8.0, 6.0, 3.0, 4.0, 4.0])
    assert np.isnan(running_mean(np.full(3, np.nan))).all()
    slope = np.linspace(5, 1, 200)
    np.testing.assert_allclose(running_mean(slope)[:190], slope[:190])


def test_numbers_as_text():
    assert [show_small(value) for value in (0.0, 0.0312, 2.14e-6, 3e7, math.nan)] == [
        "0",
        "0.031",
        "2.1 × 10⁻⁶",
        "3.0 × 10⁷",
        "nan",
    ]
    assert [show_percent(value) for value in (0, 0.5, 0.9999, 1, math.nan)] == [
        "0.0 %",
        "50.0 %",
        "just under 100 %",
        "100.0 %",
        "nan %",
    ]
    assert show_rough(347_619.0) == "350,000"
    assert [show_duration(value) for value in (2.5, 59.96, 61, 7260)] == [
        "2.5 s",
        "1 min 0 s",
        "1 min 1 s",
        "2 h 1 min",
    ]


def test_importing_the_report_does_not_import_matplotlib():
    code = "import sys, oarsmith.training.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
