"""How a model's authors would have its answers drawn: ``generation_config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from oarsmith.checkpoint.files import read_json_object
from oarsmith.engine import Sampling
from oarsmith.errors import CheckpointError, OarsmithError
from oarsmith.serve.service import OPENAI_DEFAULTS

_FILE = "generation_config.json"
_KEYS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")


def read_defaults(directory: Path) -> Mapping[str, float]:
    """Values for fields that a request leaves out; OpenAI's where the file is not there or says ``do_sample: false``.

    Raises:
        CheckpointError: a value that cannot be.
    """
    path = directory / _FILE
    if not path.is_file():
        return OPENAI_DEFAULTS
    config = read_json_object(path)
    found = {key: config[key] for key in _KEYS if config.get(key) is not None}
    if config.get("do_sample") is False or not found:
        return OPENAI_DEFAULTS
    try:
        for key, value in found.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise CheckpointError(f"{value!r} is not a number", where=f"{path}: {key}")
        Sampling(**found)
    except OarsmithError as error:
        raise CheckpointError(
            f"cannot draw answers so: {error}", where=str(path), fix="mend it, or give --generation_config none"
        ) from error
    return {**OPENAI_DEFAULTS, **found}
