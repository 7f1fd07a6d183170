"""``adapter_config.json``: values that enter arithmetic are numbers, and patterns are patterns."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oarsmith.checkpoint.files import read_json_object, require_inside
from oarsmith.errors import CheckpointError

CONFIG = "adapter_config.json"
# PEFT names both whichever there is; of the one that is saved there is a tensor (``score.py``).
_HEADS = ("score", "classifier")


@dataclass(frozen=True)
class PeftConfig:
    """The file's values, each checked when it is asked for."""

    values: dict[str, Any]
    where: str

    @property
    def peft_type(self) -> str:
        return str(self.values.get("peft_type"))

    def refuse(self, *keys: str) -> None:
        """Options that change the arithmetic and that this version does not compute: refusing beats computing
        something else.

        Raises:
            CheckpointError: one of them is used.
        """
        used = [key for key in keys if self.values.get(key)]
        if used:
            raise CheckpointError(f"{self.peft_type} with {', '.join(used)} cannot be read", where=self.where)

    def number(self, key: str, default: float) -> float:
        """A finite number of sane size."""
        value = self.values.get(key)
        return float(self._sane(key, default if value is None else value))

    def share(self, key: str) -> float:
        """A dropout."""
        value = self.number(key, 0.0)
        if not 0 <= value < 1:
            raise CheckpointError(f"{value} is not in [0, 1)", where=f"{self.where}: {key}")
        return value

    def whole(self, key: str, default: int, *, least: int = 1) -> int:
        """A whole number."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or not least <= value < 1 << 31:
            raise CheckpointError(f"{value!r} is not a whole number from {least}", where=f"{self.where}: {key}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise CheckpointError(f"{value!r} is not true or false", where=f"{self.where}: {key}")
        return value

    def for_module(self, key: str, patterns: str, module: str, default: float) -> float:
        """A number, or the value of the first pattern that ends the module's name (PEFT's rule)."""
        table = self.values.get(patterns) or {}
        if not isinstance(table, dict):
            raise CheckpointError(f"{patterns} is {table!r}, not an object", where=self.where)
        for pattern, value in table.items():
            try:
                found = re.match(rf"(.*\.)?({pattern})$", module)
            except re.error as error:
                where = f"{self.where}: {patterns}"
                raise CheckpointError(f"{pattern!r} is not a pattern: {error}", where=where) from error
            if found:
                return float(self._sane(patterns, value))
        return self.number(key, default)

    def rank_of(self, module: str) -> int:
        """The rank on a projection, for methods whose tensors do not tell."""
        value = self.for_module("r", "rank_pattern", module, 8)
        if value < 1 or value != int(value):
            raise CheckpointError(f"{value} is not a whole number from 1", where=f"{self.where}: r")
        return int(value)

    def _sane(self, key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e6:
            raise CheckpointError(f"{value!r} is not a number of sane size", where=f"{self.where}: {key}")
        return value


def read_adapter_config(directory: Path) -> PeftConfig:
    """The config of an adapter.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise CheckpointError(f"no {CONFIG} in the directory", where=str(directory), fix="check the adapter's path")
    values = read_json_object(require_inside(directory, path))
    saved = values.get("modules_to_save")
    if isinstance(saved, list) and all(name in _HEADS for name in saved):
        del values["modules_to_save"]
    return PeftConfig(values, str(path))
