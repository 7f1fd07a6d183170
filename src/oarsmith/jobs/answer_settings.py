"""What the answers to a file depend on beside its rows, to be compared with when an interrupted command goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oarsmith.config.inference import GenerateConfig
from oarsmith.engine import Sampling
from oarsmith.engine.options import NGRAM
from oarsmith.model_path import resolve

# Of a large file, as many pieces of so many bytes are looked at: training changes all of them.
_PIECES, _PIECE = 64, 4096
_SHOWN = ("model_name_or_path", "mode", "adapter", "tokenizer_name_or_path", "chat_template", "dtype", "system", "raw")

_GUESSING = ("speculative", "num_draft_tokens")


def settings_of(config: GenerateConfig, sampling: Sampling) -> dict[str, Any]:
    """Plain JSON values. How much is done at the same time, and where, is none of them: it changes only the rounding.

    Raises:
        CheckpointError: the model's path leads nowhere.
    """
    values = dict(config)
    default = vars(Sampling())
    where = resolve(config.model_name_or_path, config.adapter)
    paths = [where.base, where.adapter, config.tokenizer_name_or_path, config.chat_template]
    files = {Path(path) for path in paths if path is not None and Path(path).exists()}
    return {
        **{name: values[name] for name in _SHOWN if values[name] is not None},
        # What is drawn with a model that guesses is drawn otherwise.
        **({name: values[name] for name in _GUESSING} if config.speculative not in (None, NGRAM) else {}),
        **{name: _plain(value) for name, value in vars(sampling).items() if value != default[name]},
        "content of the model's files": _digest(sorted(files)),
    }


def _plain(value: Any) -> Any:
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else value


def _digest(paths: list[Path]) -> str:
    """Of files, and of those directly in directories: names, sizes and content (see ``_PIECES``)."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        inside = sorted(entry for entry in path.iterdir() if entry.is_file()) if path.is_dir() else [path]
        for file in inside:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode("utf-8", "surrogateescape"))
            with file.open("rb") as content:
                if size <= _PIECES * _PIECE:
                    digest.update(content.read())
                    continue
                for piece in range(_PIECES):
                    content.seek(piece * (size - _PIECE) // (_PIECES - 1))
                    digest.update(content.read(_PIECE))
    return digest.hexdigest()
