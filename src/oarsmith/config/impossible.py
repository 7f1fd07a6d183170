"""One combination of values that cannot work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from .base import JobConfig

C = TypeVar("C", bound=JobConfig)


@dataclass(frozen=True)
class Impossible(Generic[C]):
    """A ``keys`` configuration for which ``when`` holds cannot run."""

    keys: type[C]
    when: Callable[[C], bool]
    reason: str
    fix: str
