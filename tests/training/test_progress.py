"""What is printed while training."""

import io

from rich.console import Console

from oarsmith.training.progress import Progress, show_speed

SPEED = {"tokens_per_second": 1234.4, "mfu": 0.523, "peak_memory_mb": 1536.0}


def shown(*, terminal, quiet=False, report=True):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120, soft_wrap=True, markup=False)
    with Progress(console, quiet=quiet) as progress:
        progress.start(2, 6)
        for step in (3, 4, 5, 6):
            progress.step(step, 1.5, 100)
            if report and step % 2 == 0:
                progress.report(step, loss=1.25, learning_rate=2e-4, speed=SPEED)
        progress.message("step 6: [saved]")
    return file.getvalue()


def test_a_line_for_each_line_of_the_log():
    lines = shown(terminal=False).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("step 4/6  loss 1.2500  lr 2.00e-04  1,234 tok/s  MFU 52%  1.50 GiB  about ")
    assert lines[0].endswith(" s left")
    assert lines[1].startswith("step 6/6  loss 1.2500  lr 2.00e-04  1,234 tok/s  MFU 52%  1.50 GiB  took ")
    assert lines[2] == "step 6: [saved]"
    assert "\x1b" not in "".join(lines), "no control characters in a file"


def test_a_sign_of_life_between_lines_of_the_log(monkeypatch):
    monkeypatch.setattr("oarsmith.training.progress._SILENCE", -1.0)
    lines = shown(terminal=False, report=False).splitlines()
    assert [line.split("  ")[0] for line in lines[:4]] == ["step 3/6", "step 4/6", "step 5/6", "step 6/6"]
    assert "loss 1.5000" in lines[0] and "tok/s" in lines[0]


def test_a_bar_on_a_terminal():
    text = shown(terminal=True)
    assert "6/6" in text
    assert "loss 1.500  lr 2.00e-04  1,234 tok/s  MFU 52%  1.50 GiB" in text
    assert "[saved]" in text


def test_quiet_prints_messages_alone():
    assert shown(terminal=False, quiet=True) == "step 6: [saved]\n"
    assert "6/6" not in shown(terminal=True, quiet=True)


def test_speed_without_a_rate():
    assert show_speed({"tokens_per_second": 9.6, "peak_memory_mb": 300.2}) == "10 tok/s  300 MiB"


def test_stop_twice():
    progress = Progress(Console(file=io.StringIO(), force_terminal=True))
    progress.start(0, 1)
    progress.stop()
    progress.stop()
