"""The weights of a directory, whatever they are stored as, through one interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from oarsmith.checkpoint import safetensors_source, torch_bin
from oarsmith.checkpoint.config_file import read_config
from oarsmith.checkpoint.fill import file_infos
from oarsmith.checkpoint.paddle.quantized import CODES, QuantizedPaddle
from oarsmith.checkpoint.paddle.source import PaddleSource, is_paddle, open_paddle_files
from oarsmith.checkpoint.quantized.unpacked import QUANTIZATION, unpacked
from oarsmith.checkpoint.safetensors_source import SafetensorsSource
from oarsmith.checkpoint.tensors import TensorSource
from oarsmith.checkpoint.text_part import text_part
from oarsmith.checkpoint.torch_bin import TorchBinSource
from oarsmith.errors import CheckpointError
from oarsmith.models import families

__all__ = ["TensorSource", "open_model", "open_source"]

_READERS: tuple[tuple[str, type[SafetensorsSource] | type[TorchBinSource]], ...] = (
    (safetensors_source.INDEX, SafetensorsSource),
    (safetensors_source.SINGLE, SafetensorsSource),
    (torch_bin.INDEX, TorchBinSource),
    (torch_bin.SINGLE, TorchBinSource),
)


def open_model(directory: Path) -> tuple[dict[str, Any], TensorSource]:
    """The config and the weights of a model directory, both as plain Hugging Face ones.

    Safetensors, PyTorch's ``.bin`` and PaddleNLP's layouts are read; quantized formats appear as the 16-bit weights
    they stand for, without the ``quantization_config`` that describes them.

    Raises:
        OarsmithError: no model in the directory, damaged files, or a family that is not known.
    """
    config = read_config(directory)
    if not is_paddle(directory):
        return unpacked(config, text_part(open_source(directory)))
    family, spec = families.build_spec(config)
    infos = file_infos(spec, config, family.names(spec), torch.float32)
    shapes = {name: info.shape for name, info in infos.items()}
    source: TensorSource = PaddleSource(open_paddle_files(directory), config, shapes)
    if any(code in CODES for code in source.dtypes.values()):
        source = QuantizedPaddle(source, config)
    return {key: value for key, value in config.items() if key not in QUANTIZATION}, source


def open_source(directory: Path) -> TensorSource:
    """The tensors of a directory as its files hold them: safetensors where there are any, else PyTorch's ``.bin``.

    Raises:
        CheckpointError: no weights in the directory, a missing or damaged file, an index that points outside.
    """
    for name, reader in _READERS:
        if (directory / name).exists():
            return reader(directory / name)
    raise no_weights(directory)


def has_weights(directory: Path) -> bool:
    """Whether there are weights beside the config."""
    return is_paddle(directory) or any((directory / name).exists() for name, _ in _READERS)


def no_weights(directory: Path) -> CheckpointError:
    present = sorted(p.name for p in directory.iterdir())[:12] if directory.is_dir() else []
    ggufs = [name for name in present if name.endswith(".gguf")]
    return CheckpointError(
        f"no {safetensors_source.SINGLE} in the directory; it holds {', '.join(present) or 'nothing'}",
        where=str(directory),
        fix=f"oarsmith convert {directory / ggufs[0]} OUT" if ggufs else "check the path",
    )
