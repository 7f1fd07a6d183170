"""A configuration with every value settled, where each came from, and its file that alone replays the run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from oarsmith._version import __version__
from oarsmith.atomic import atomic_write_text

from .base import JobConfig, groups_of
from .entries import META_KEY

C = TypeVar("C", bound=JobConfig)

RUN_FILE = "run.json"

# What nobody has given, now or in the run that a file replays.
_NOT_GIVEN = re.compile(r"(^|, saved from: )(default$|derived \()")


def is_given(origin: str) -> bool:
    """Whether somebody chose the value that came from there."""
    return not _NOT_GIVEN.search(origin)


@dataclass(frozen=True)
class Resolved(Generic[C]):
    """What a job runs with.

    Args:
        config: the values.
        provenance: key -> ``default``, ``file:line``, ``command line`` or ``derived (rule)``; every key has an entry.
        without_effect: given keys that mean nothing here -> why.
        notes: further things the user should hear once.
    """

    config: C
    provenance: Mapping[str, str]
    without_effect: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def settle(self, reason: str, **values: Any) -> Resolved[C]:
        """Fix values that only the running machine could decide (``auto``), so that the saved file replays them."""
        config = type(self.config).model_validate({**self.config.model_dump(), **values})
        return replace(
            self, config=config, provenance={**self.provenance, **dict.fromkeys(values, f"derived ({reason})")}
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the configuration as JSON (atomically: the file is complete or the old one)."""
        meta = {"job": self.config.command, "version": __version__, "provenance": dict(self.provenance)}
        dumped = self.config.model_dump(mode="json")
        values = {key: dumped[key] for keys in groups_of(type(self.config)).values() for key in keys}
        text = json.dumps({**values, META_KEY: meta}, indent=2, ensure_ascii=False) + "\n"
        atomic_write_text(Path(path), text)
