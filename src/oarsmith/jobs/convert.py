"""``oarsmith convert``: a model or adapter from one layout into another, checked before success is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from oarsmith.adapters.paddle_layout import (
    is_paddle_adapter,
    paddle_from_peft,
    peft_from_paddle,
    read_paddle_adapter_config,
)
from oarsmith.adapters.peft_config import CONFIG as PEFT_CONFIG
from oarsmith.adapters.peft_config import read_adapter_config
from oarsmith.atomic import temporary_directory
from oarsmith.checkpoint.config_file import read_config
from oarsmith.checkpoint.convert import Target, changes_values, convert_directory, require_known_target
from oarsmith.checkpoint.files import read_json_object
from oarsmith.checkpoint.gguf.convert import convert_gguf
from oarsmith.checkpoint.gguf.write import write_gguf
from oarsmith.checkpoint.paddle.config import from_paddle_config
from oarsmith.checkpoint.streamed import Difference, difference, probe_tokens, streamed_logits
from oarsmith.config.checkpoints import ConvertConfig
from oarsmith.config.resolved import Resolved
from oarsmith.errors import CheckpointError
from oarsmith.jobs.console import make_console
from oarsmith.jobs.outputs import Show, check_destination, check_file, describe, progress_bar
from oarsmith.loading import pick_dtype
from oarsmith.model_path import resolve
from oarsmith.models import families


def run(resolved: Resolved[ConvertConfig]) -> int:
    """The command."""
    config = resolved.config
    console = make_console()
    src, dst = only_gguf(Path(config.src)), Path(config.dst)
    if is_adapter(src):
        check_destination(dst, config.overwrite, inputs=[src])
        convert_adapter(src, dst, config, console)
    elif src.is_file() and src.suffix == ".gguf":
        check_destination(dst, config.overwrite, inputs=[src])
        from_gguf(src, dst, config, console)
    elif config.to == "gguf":
        to_gguf(resolve(src).base, dst, config, console)
    else:
        check_destination(dst, config.overwrite, inputs=[src])
        directory_to_directory(resolve(src).base, dst, config, console)
    return 0


def directory_to_directory(src: Path, dst: Path, config: ConvertConfig, console: Console) -> None:
    """Between safetensors, PyTorch's and PaddleNLP's layouts: values do not change, but for a cast or a NormHead."""
    target, model = _target(config), read_config(src)
    require_known_target(target, model)
    dtype = pick_dtype(config.dtype)
    exact = not changes_values(model, target, dtype)
    with progress_bar(console) as show:

        def check(folder: Path) -> None:
            found = probe(src, folder, show)
            console.print(f"checked on probe tokens: {describe(found)}")
            if exact and not found.none:
                raise CheckpointError(
                    f"the written model answers differently: max |dlogit| {found.max_logit:g}", where=str(dst)
                )

        report = convert_directory(
            src,
            dst,
            target,
            dtype=dtype,
            max_shard_bytes=int(config.max_shard_gb * 1e9),
            progress=show,
            check=check,
        )
    count = f"{report.num_tensors:,} tensors, {report.num_parameters:,} parameters"
    console.print(f"wrote {dst}: {count}, read back: names, shapes and hashes agree")
    console.print(f"next:  oarsmith chat {dst}")


def from_gguf(src: Path, dst: Path, config: ConvertConfig, console: Console) -> None:
    """A GGUF file becomes a Hugging Face directory; other layouts are made from that."""
    if config.to == "gguf":
        raise CheckpointError("the source is a GGUF file already", where=str(src), fix="choose another --to")
    if config.to == "hf":
        gguf_to_directory(src, dst, config.dtype, console, overwrite=config.overwrite)
        with progress_bar(console) as show:
            probe(dst, dst, show)  # every tensor in its place, read by the decoder itself
        console.print(f"wrote {dst}: {read_config(dst)['model_type']}, read back and complete")
        console.print(f"next:  oarsmith chat {dst}")
        return
    with temporary_directory(dst) as staged:
        gguf_to_directory(src, staged / "hf", config.dtype, console)
        plain = config.model_copy(update={"dtype": "auto"})
        directory_to_directory(staged / "hf", dst, plain, console)


def to_gguf(src: Path, dst: Path, config: ConvertConfig, console: Console) -> None:
    """Write a GGUF file, read it back, and say how far its answers are from the source's."""
    if dst.suffix != ".gguf":
        dst = dst / "model.gguf"
    check_file(dst, config.overwrite)
    with progress_bar(console) as show, temporary_directory(dst) as staged:
        report = write_gguf(
            src,
            staged / dst.name,
            type=config.gguf_type,
            with_tokenizer=config.with_tokenizer,
            progress=lambda done, total: show("writing", done, total),
        )
        convert_gguf(
            staged / dst.name,
            staged / "back",
            "auto",
            lambda done, total: show("verifying", done, total),
        )
        found = probe(src, staged / "back", show)
        (staged / dst.name).replace(dst)
    for note in report.notes:
        console.print(f"note:  {note}")
    console.print(f"wrote {dst}: {report.architecture}, {report.num_tensors:,} tensors, {config.gguf_type}")
    console.print(f"read back, and checked on probe tokens: {describe(found)}")


def convert_adapter(src: Path, dst: Path, config: ConvertConfig, console: Console) -> None:
    """Between PEFT's layout and PaddleNLP's."""
    theirs = read_paddle_adapter_config(src) if is_paddle_adapter(src) else read_adapter_config(src).values
    base = config.model_name_or_path or theirs.get("base_model_name_or_path")
    model, folder = _base_config(src, base)
    if is_paddle_adapter(src) and config.to == "hf":
        count = peft_from_paddle(src, dst, model, base=config.model_name_or_path, weights=folder)
    elif not is_paddle_adapter(src) and config.to == "paddle":
        pickled = config.paddle_layout == "pdparams"
        count = paddle_from_peft(src, dst, model, base=config.model_name_or_path, pickled=pickled)
    else:
        raise CheckpointError(
            f"an adapter of this layout is not converted to {config.to!r}",
            where=str(src),
            fix=f"--to {'hf' if is_paddle_adapter(src) else 'paddle'}, or merge it first: oarsmith merge-adapter {src}",
        )
    console.print(f"wrote {dst}: {count} adapter tensors, read back: names, shapes and hashes agree")


def _base_config(src: Path, base: str | None) -> tuple[dict[str, Any], Path | None]:
    """The base model's config, and its folder; or the copy that PaddleNLP puts beside its adapters."""
    for folder in (src / str(base), Path(str(base))):
        if base is not None and (folder / "config.json").is_file():
            return read_config(folder), folder
    if is_paddle_adapter(src) and (src / "config.json").is_file():
        return from_paddle_config(read_json_object(src / "config.json")), None
    raise CheckpointError(
        f"the adapter's base model {base!r} is not there", where=str(src), fix="name it: --model_name_or_path BASE"
    )


def only_gguf(src: Path) -> Path:
    """The GGUF file of a directory that holds one and no other model; any other path as it is."""
    files = sorted(src.glob("*.gguf")) if src.is_dir() and not (src / "config.json").exists() else []
    return files[0] if len(files) == 1 else src


def is_adapter(src: Path) -> bool:
    """Whether a path is an adapter directory of PEFT or PaddleNLP."""
    return is_paddle_adapter(src) or ((src / PEFT_CONFIG).is_file() and not (src / "config.json").is_file())


def probe(a: Path, b: Path, show: Show) -> Difference:
    """Run both models over the same tokens, a layer of them in memory at a time."""
    show("comparing answers", 0, 2)
    ids = probe_tokens(families.build_spec(read_config(a))[1])
    before = streamed_logits(a, ids)
    show("comparing answers", 1, 2)
    return difference(before, before if a == b else streamed_logits(b, ids))


def gguf_to_directory(src: Path, dst: Path, dtype: str, console: Console, *, overwrite: bool = False) -> None:
    """Convert with a progress bar."""
    with progress_bar(console) as show:
        report = convert_gguf(src, dst, dtype, lambda done, total: show("converting", done, total), overwrite=overwrite)
    for note in report.notes:
        console.print(f"note:  {note}")


def _target(config: ConvertConfig) -> Target:
    match config.to:
        case "paddle":
            return "pdparams" if config.paddle_layout == "pdparams" else "paddle"
        case "bin":
            return "bin"
        case _:
            return "hf"
