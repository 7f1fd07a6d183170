"""``oarsmith convert``: a GGUF file, or another model directory, into a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from oarsmith.checkpoint.gguf import convert_gguf
from oarsmith.config.checkpoints import ConvertConfig
from oarsmith.config.resolved import Resolved
from oarsmith.errors import CheckpointError
from oarsmith.jobs.runtime import make_console
from oarsmith.loading import load_model, resolve, save_model
from oarsmith.text import load_tokenizer


def run(resolved: Resolved[ConvertConfig]) -> int:
    """The command."""
    config = resolved.config
    console = make_console()
    src, dst = Path(config.src), Path(config.dst)
    check_destination(dst, config.overwrite, inputs=[src])
    if src.is_file() and src.suffix == ".gguf":
        gguf_to_directory(src, dst, config.dtype, console, overwrite=config.overwrite)
    else:
        where = resolve(src)
        if where.adapter is not None:
            raise CheckpointError(
                "this is an adapter", where=str(src), fix=f"oarsmith merge-adapter {src} {dst} writes a plain model"
            )
        save_model(load_model(where.base, dtype=config.dtype), dst, load_tokenizer(where.base))
    # Reading everything back is the proof that what was written is whole.
    model = load_model(dst)
    count = sum(parameter.numel() for parameter in model.parameters())
    console.print(f"wrote {dst}: {model.config['model_type']}, {count:,} parameters, read back and complete")
    console.print(f"next:  oarsmith chat {dst}")
    return 0


def gguf_to_directory(src: Path, dst: Path, dtype: str, console: Console, *, overwrite: bool = False) -> None:
    """Convert with a progress bar."""
    columns = TextColumn("converting"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("converting", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        convert_gguf(src, dst, dtype, show, overwrite=overwrite)


def check_destination(dst: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Refuse a destination that holds something, unless it is a model that may be replaced.

    It is replaced only when the new model is complete, so a command that fails costs nothing.
    """
    if not dst.exists() or (dst.is_dir() and not any(dst.iterdir())):
        return
    if not overwrite:
        raise CheckpointError("the destination is not empty", where=str(dst), fix="choose another, or add --overwrite")
    if not (dst / "config.json").is_file():
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
