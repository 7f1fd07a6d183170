"""Models by path: the one place that knows model directories, adapter directories and run folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from oarsmith.adapters.lora import attach
from oarsmith.adapters.peft_layout import CONFIG as ADAPTER_CONFIG
from oarsmith.adapters.peft_layout import adapter_rewrite, load_adapter_weights, read_adapter_config
from oarsmith.atomic import atomic_directory
from oarsmith.checkpoint.config_file import check_config, read_config
from oarsmith.checkpoint.fill import empty_decoder
from oarsmith.checkpoint.hf import DTYPES, load_decoder, write_decoder
from oarsmith.config.resolved import RUN_FILE
from oarsmith.errors import CheckpointError, ConfigError
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.init import init_weights
from oarsmith.text import Tokenizer, load_tokenizer


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
        base = read_adapter_config(where).get("base_model_name_or_path")
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


def pick_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("no CUDA device is available", where="device", fix="use device cpu or auto")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}", where="device", fix="use auto, cpu, cuda or cuda:N") from error


def pick_dtype(name: str) -> torch.dtype | None:
    """``fp32``, ``bf16``, ``fp16`` (or torch's names); ``auto`` is what the files hold."""
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(name, name)
    if short == "auto":
        return None
    if short not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}", where="dtype", fix=f"use auto or one of {', '.join(DTYPES)}")
    return DTYPES[short]


def dtype_name(dtype: torch.dtype) -> str:
    """The config's name of a torch dtype."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def load_model(
    path: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    adapter: str | Path | None = None,
) -> Decoder:
    """A decoder from a model directory, an adapter directory or a run folder, in eval mode.

    Args:
        dtype: ``auto`` keeps what the files hold; or ``fp32``, ``bf16``, ``fp16`` or a torch dtype.
        device: ``auto`` is the GPU where there is one, else the CPU.
        adapter: a LoRA adapter in PEFT's layout to put on top.

    Raises:
        OarsmithError: the path, the files or the architecture cannot be used; says what to do.
    """
    where = resolve(path, adapter)
    rewrite = adapter_rewrite(where.adapter) if where.adapter else None
    model = load_decoder(
        where.base,
        dtype=dtype if isinstance(dtype, torch.dtype) else pick_dtype(dtype),
        device=device if isinstance(device, torch.device) else pick_device(device),
        rewrite=rewrite,
    )
    if where.adapter:
        attach(model, seed=0)
        load_adapter_weights(model, where.adapter)
    return model.eval()


def new_model(
    config: str | Path | Mapping[str, Any],
    *,
    seed: int = 0,
    dtype: str | torch.dtype = "fp32",
    device: str | torch.device = "auto",
) -> Decoder:
    """A decoder with fresh weights, from a ``config.json`` alone, in eval mode.

    Args:
        config: the file, the directory it lies in, or its contents.
        seed: the same seed gives the same weights on any machine.

    Raises:
        OarsmithError: the config is missing, damaged or of no known family.
    """
    if isinstance(config, Mapping):
        contents = dict(config)
        check_config(contents, "config")
    else:
        path = Path(config)
        contents = read_config(path.parent if path.name == "config.json" else path)
    _, spec = families.build_spec(contents)
    wanted = dtype if isinstance(dtype, torch.dtype) else pick_dtype(dtype)
    model = empty_decoder(
        spec,
        contents,
        wanted or torch.float32,
        device if isinstance(device, torch.device) else pick_device(device),
    )
    init_weights(model, seed)
    return model.eval()


def save_model(model: Decoder, path: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write a Hugging Face directory: complete under ``path``, or not there at all.

    Raises:
        OarsmithError: the model carries an adapter, or the disk is full.
    """
    with atomic_directory(Path(path)) as folder:
        write_decoder(model, folder)
        if tokenizer is not None:
            tokenizer.save(folder)
