"""Adapters in PaddleNLP's layout, from and to PEFT's, by what config lies there: LoRA, MoRA, LoKr, VeRA, prefixes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oarsmith.adapters.mora import Mora
from oarsmith.adapters.paddle_lora import LORA_CONFIG, check_lora_config, lora_from_peft, lora_to_peft
from oarsmith.adapters.paddle_prefix import PREFIX_CONFIG, check_prefix_config, prefix_from_peft, prefix_to_peft
from oarsmith.adapters.paddle_square import (
    LOKR,
    LOKR_CONFIG,
    MORA,
    check_lokr_config,
    lokr_of,
    square_from_peft,
    square_to_peft,
)
from oarsmith.adapters.paddle_vera import VERA_CONFIG, check_vera_config, vera_from_peft, vera_to_peft
from oarsmith.adapters.peft_config import CONFIG, read_adapter_config
from oarsmith.checkpoint.files import read_json_object
from oarsmith.errors import CheckpointError

_CHECKS = {
    LORA_CONFIG: check_lora_config,
    LOKR_CONFIG: check_lokr_config,
    VERA_CONFIG: check_vera_config,
    PREFIX_CONFIG: check_prefix_config,
}


def is_paddle_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter in PaddleNLP's layout."""
    return any((directory / name).is_file() for name in _CHECKS)


def _config_name(directory: Path) -> str:
    return next(name for name in _CHECKS if (directory / name).is_file())


def read_paddle_adapter_config(directory: Path) -> dict[str, Any]:
    """The config of PaddleNLP's adapter.

    Raises:
        CheckpointError: it is damaged, or asks for what cannot be converted.
    """
    name = _config_name(directory)
    config = read_json_object(directory / name)
    _CHECKS[name](config, str(directory / name))
    return config


def peft_from_paddle(
    src: Path, dst: Path, config: Mapping[str, Any], *, base: str | None, weights: Path | None = None
) -> int:
    """Write the PEFT adapter ``dst`` from PaddleNLP's ``src``; returns the number of tensors.

    Args:
        config: the base model's, in the Hugging Face spelling.
        base: what ``base_model_name_or_path`` shall say; None keeps what the adapter says.
        weights: the base model's folder, where it is there.

    Raises:
        CheckpointError: a method that is not converted, damaged or missing files, tensors the base model has no place
            for.
    """
    theirs, name = read_paddle_adapter_config(src), _config_name(src)
    said = base or theirs.get("base_model_name_or_path")
    if name == VERA_CONFIG:
        return vera_to_peft(src, dst, theirs, config, said, weights)
    if name == PREFIX_CONFIG:
        return prefix_to_peft(src, dst, theirs, config, said)
    if name == LOKR_CONFIG:
        return square_to_peft(src, dst, lokr_of(theirs), LOKR, config, said)
    if theirs.get("use_mora"):
        return square_to_peft(src, dst, Mora(rank=theirs["r"]), MORA, config, said)
    return lora_to_peft(src, dst, theirs, config, said)


def paddle_from_peft(src: Path, dst: Path, config: Mapping[str, Any], *, base: str | None, pickled: bool) -> int:
    """Write PaddleNLP's adapter ``dst`` from the PEFT one ``src``; the counterpart of `peft_from_paddle`.

    Args:
        pickled: as ``.pdparams``, where PaddleNLP reads another file of the method at all.
    """
    described = read_adapter_config(src)
    if described.peft_type == "LORA":
        return lora_from_peft(src, dst, described, config, base, pickled=pickled)
    if described.peft_type in ("LOKR", "MORA"):
        return square_from_peft(src, dst, described, config, base, pickled=pickled)
    if described.peft_type == "PREFIX_TUNING":
        return prefix_from_peft(src, dst, described, config, base)
    if described.peft_type == "VERA":
        return vera_from_peft(src, dst, described, config, base)
    raise CheckpointError(f"adapters of type {described.peft_type!r} cannot be converted", where=str(src / CONFIG))
