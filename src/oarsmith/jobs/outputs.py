"""Where results of commands go, and how far they are: destinations that may be replaced, a progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from oarsmith.checkpoint.streamed import Difference
from oarsmith.errors import CheckpointError
from oarsmith.model_path import ADAPTER_CONFIG

Show = Callable[[str, int, int], None]


def describe(found: Difference) -> str:
    """One line."""
    if found.none:
        return "logits are the same, max |dlogit| 0"
    return f"max |dlogit| {found.max_logit:.3g}, KL {found.kl:.2g} nats, same best token {found.top1:.0%}"


@contextmanager
def progress_bar(console: Console) -> Iterator[Show]:
    """What is being done, how far it is and how long it will take."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading headers", total=None)

        def show(what: str, done: int, total: int) -> None:
            if bar.tasks[0].description != what:
                bar.reset(task, total=total, description=what)
            bar.update(task, completed=done, total=total)

        yield show


def check_file(dst: Path, overwrite: bool) -> None:
    """Refuse a file that is there already, unless it may be replaced."""
    if dst.is_dir() or (dst.exists() and not overwrite):
        raise CheckpointError("the destination exists", where=str(dst), fix="choose another, or add --overwrite")


def check_destination(dst: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Refuse a destination that holds something, unless it is a model that may be replaced.

    It is replaced only when the new model is complete, so a command that fails costs nothing.
    """
    if not dst.exists() or (dst.is_dir() and not any(dst.iterdir())):
        return
    if not overwrite:
        raise CheckpointError("the destination is not empty", where=str(dst), fix="choose another, or add --overwrite")
    from oarsmith.adapters.paddle_layout import is_paddle_adapter  # many files, and mostly not needed

    if not is_paddle_adapter(dst) and not any((dst / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        raise CheckpointError(
            "the destination holds something else than a model, so it is not replaced",
            where=str(dst),
            fix="choose another",
        )
    for path in inputs:
        if dst.resolve() == path.resolve() or dst.resolve() in path.resolve().parents:
            raise CheckpointError(
                f"replacing the destination would delete {path}, which is read", where=str(dst), fix="choose another"
            )
