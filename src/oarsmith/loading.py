"""Models by path, with their adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from oarsmith.adapters.linear import attach
from oarsmith.adapters.peft_layout import adapted_config, adapter_rewrite, load_adapter_weights, require_base
from oarsmith.atomic import atomic_directory
from oarsmith.checkpoint.config_file import check_config, read_config
from oarsmith.checkpoint.fill import empty_decoder
from oarsmith.checkpoint.hf import DTYPES, load_decoder, write_decoder
from oarsmith.errors import ConfigError
from oarsmith.model_path import resolve
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.init import init_weights
from oarsmith.text import Tokenizer


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
    *,
    any_base: bool = False,
) -> Decoder:
    """A decoder from a model directory, an adapter directory or a run folder, in eval mode.

    Args:
        dtype: ``auto`` keeps what the files hold; or ``fp32``, ``bf16``, ``fp16`` or a torch dtype.
        device: ``auto`` is the GPU where there is one, else the CPU.
        adapter: an adapter in PEFT's layout to put on top.
        any_base: also on another base than the adapter was trained on, where its file tells.

    Raises:
        OarsmithError: the path, the files or the architecture cannot be used; says what to do.
    """
    where = resolve(path, adapter)
    rewrite = adapter_rewrite(where.adapter) if where.adapter else None
    if where.adapter and not any_base:
        require_base(where.adapter, where.base)
    model = load_decoder(
        where.base,
        dtype=dtype if isinstance(dtype, torch.dtype) else pick_dtype(dtype),
        device=device if isinstance(device, torch.device) else pick_device(device),
        rewrite=rewrite,
        config=adapted_config(where.adapter, where.base) if where.adapter else None,
    )
    if where.adapter:
        attach(model, seed=0)
        load_adapter_weights(model, where.adapter, any_base=any_base)
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
