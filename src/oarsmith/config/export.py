"""Configuration of ``oarsmith export``: a model as a compiled package."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from .base import Bool
from .groups import ModelKeys, RuntimeKeys


class ExportConfig(ModelKeys, RuntimeKeys):
    """All keys of ``oarsmith export``."""

    title: ClassVar[str] = "Export"
    command: ClassVar[str] = "export"
    positional: ClassVar[tuple[str, ...]] = ("model_name_or_path", "output_dir")

    output_dir: str = Field(description="The folder of the package.")
    overwrite_output_dir: Bool = Field(False, description="Replace output_dir if it exists.")
