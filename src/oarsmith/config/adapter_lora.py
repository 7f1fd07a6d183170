"""Keys of the relatives of LoRA."""

from __future__ import annotations

from typing import ClassVar

from .base import JobConfig


class LoraFamilyKeys(JobConfig):
    title: ClassVar[str] = "Adapters"
