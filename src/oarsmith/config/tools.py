"""Configurations of the commands that show and check: quickstart, preview, explain, models, doctor."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .base import Bool, Int, JobConfig
from .groups import DataKeys, ModelKeys
from .preferences import PromptKeys, StepKeys


class QuickstartConfig(JobConfig):
    """All keys of ``oarsmith quickstart``."""

    title: ClassVar[str] = "Quickstart"
    command: ClassVar[str] = "quickstart"
    positional: ClassVar[tuple[str, ...]] = ("output_dir",)

    output_dir: str = Field("oarsmith-quickstart", description="Folder for the model, the run and the report.")
    overwrite_output_dir: Bool = Field(False, description="Start anew although output_dir exists.")
    seed: Int = Field(42, ge=0, description="Everything random follows from this number.")


class PreviewConfig(ModelKeys, DataKeys, PromptKeys, StepKeys):
    """All keys of ``oarsmith preview``. It reads the files of ``oarsmith sft`` unchanged."""

    title: ClassVar[str] = "Preview"
    command: ClassVar[str] = "preview"
    positional: ClassVar[tuple[str, ...]] = ("model_name_or_path", "dataset_name_or_path")
    also_accepts: ClassVar[tuple[str, ...]] = ("sft", "dpo", "kto", "reward")

    count: Int = Field(3, ge=1, description="Samples to show.")
    stage: Literal["auto", "sft", "dpo", "kto", "reward"] = Field(
        "auto",
        description="The command that the rows are for: they are shown as it trains on them. auto: recognised by the "
        "first row's fields.",
    )


class ExplainConfig(JobConfig):
    """All keys of ``oarsmith explain``."""

    title: ClassVar[str] = "Explain"
    command: ClassVar[str] = "explain"
    positional: ClassVar[tuple[str, ...]] = ("config_file", "key")

    config_file: str | None = Field(None, description="A configuration, or a run folder (its resolved configuration).")
    key: str | None = Field(None, description="The key to explain. Not given: a table of all.")
    job: str | None = Field(None, description="The command the file is for. Not given: recognised by its keys.")


class ModelsConfig(JobConfig):
    """``oarsmith models`` has no keys."""

    title: ClassVar[str] = "Models"
    command: ClassVar[str] = "models"


class DoctorConfig(JobConfig):
    """``oarsmith doctor`` has no keys."""

    title: ClassVar[str] = "Doctor"
    command: ClassVar[str] = "doctor"
