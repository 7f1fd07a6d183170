"""What a model's path refers to: model directories, adapter directories, run folders. No PyTorch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from oarsmith.checkpoint.files import read_json_object
from oarsmith.config.resolved import RUN_FILE
from oarsmith.errors import CheckpointError
from oarsmith.text import Tokenizer, load_tokenizer

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class ModelPath:
    """Where a model's parts lie: ``base`` holds config, weights and tokenizer, ``adapter`` an adapter on top of it."""

    base: Path
    adapter: Path | None = None


def resolve(path: str | Path, adapter: str | Path | None = None) -> ModelPath:
    """What a path the user typed refers to.

    A run folder stands for its ``merged`` or ``model`` folder, or its ``adapter``; an adapter directory for itself on
    the base it names (relative names are looked up from the adapter's directory, then from here).

    Raises:
        CheckpointError: an adapter whose base cannot be found.
    """
    where = Path(path)
    if (where / RUN_FILE).is_file():
        parts = [where / name for name in ("merged", "model", "adapter") if (where / name).is_dir()]
        if not parts:
            raise CheckpointError("this run has not finished: no model yet", where=str(where), fix="resume the run")
        where = parts[0]
    if (where / ADAPTER_CONFIG).is_file() and not (where / "config.json").is_file():
        base = read_json_object(where / ADAPTER_CONFIG).get("base_model_name_or_path")
        candidates = [where / str(base), Path(str(base))]
        found = next((candidate for candidate in candidates if (candidate / "config.json").is_file()), None)
        if base is None or found is None:
            raise CheckpointError(
                f"the adapter's base model {base!r} is not there",
                where=str(where),
                fix="name the base model and pass the adapter with --adapter",
            )
        if adapter is not None:
            raise CheckpointError("the path is an adapter already", where=str(where), fix="name the base model instead")
        return ModelPath(found, where)
    if where.is_dir() and not (where / "config.json").is_file() and (files := sorted(where.glob("*.gguf"))):
        raise CheckpointError(
            f"the directory holds {files[0].name}, a GGUF file",
            where=str(where),
            fix=f"make a model directory of it: oarsmith convert {files[0]} OUT",
        )
    return ModelPath(where, None if adapter is None else adapter_directory(Path(adapter)))


def adapter_directory(path: Path) -> Path:
    """An adapter's own directory: a run folder stands for its ``adapter``."""
    return path / "adapter" if (path / RUN_FILE).is_file() else path


def find_tokenizer(path: str | Path, adapter: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a model path: the adapter's own where it has one (it may carry a template), else the base's."""
    where = resolve(path, adapter)
    if where.adapter is not None and (where.adapter / "tokenizer_config.json").is_file():
        return load_tokenizer(where.adapter)
    return load_tokenizer(where.base)
