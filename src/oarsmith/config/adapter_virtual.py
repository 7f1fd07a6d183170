"""Keys of methods on prompts, caches, hidden states and single rows."""

from __future__ import annotations

from typing import ClassVar

from .base import JobConfig


class VirtualKeys(JobConfig):
    title: ClassVar[str] = "Adapters"
