"""Configuration of ``oarsmith compare``: several methods of fine-tuning on the same data under one budget."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from .base import Bool, Words
from .sft import SftConfig

FULL = "full"


class CompareConfig(SftConfig):
    """All keys of ``oarsmith compare``: those of ``oarsmith sft``, which every run shares, and which methods."""

    title: ClassVar[str] = "Comparison"
    command: ClassVar[str] = "compare"
    also_accepts: ClassVar[tuple[str, ...]] = ("sft",)

    output_dir: str = Field("runs/compare", description="Table, picture, and a run folder for each method.")
    methods: Words = Field(
        (FULL, "lora"),
        description="What to compare, separated by commas: full (all weights) or an adapter_type, each with settings "
        "of its own behind colons, as in lora:lora_rank=16:learning_rate=1e-4. What is not set there is the same for "
        "all.",
    )
    continue_on_error: Bool = Field(
        False, description="Go on where a run fails. Not so: the first failure ends the command."
    )

    @property
    def has_adapter(self) -> bool:
        """Some of the methods do."""
        return True
