"""What is printed while training."""

import io

from rich.console import Console

from oarsmith.training.progress import Progress


def shown(*, terminal, quiet=False):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100, soft_wrap=True, markup=False)
    with Progress(console, quiet=quiet) as progress:
        progress.start(2, 5)
        for step in (3, 4, 5):
            progress.step(step, 1.5, 100)
        progress.message("step 5: [saved]")
    return file.getvalue()


def test_lines_without_a_terminal():
    text = shown(terminal=False)
    assert "step 5/5  loss 1.500" in text
    assert "tok/s  took" in text
    assert "[saved]" in text
    assert "\x1b" not in text, "no control characters in a file"


def test_a_bar_on_a_terminal():
    text = shown(terminal=True)
    assert "5/5" in text
    assert "loss 1.500" in text
    assert "[saved]" in text


def test_quiet_prints_messages_alone():
    assert shown(terminal=False, quiet=True) == "step 5: [saved]\n"
    assert "5/5" not in shown(terminal=True, quiet=True)


def test_stop_twice():
    progress = Progress(Console(file=io.StringIO(), force_terminal=True))
    progress.start(0, 1)
    progress.stop()
    progress.stop()
