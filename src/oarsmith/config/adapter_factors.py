"""Keys of methods with other factors of the update than LoRA."""

from __future__ import annotations

from typing import ClassVar

from .base import JobConfig


class FactorKeys(JobConfig):
    title: ClassVar[str] = "Adapters"
