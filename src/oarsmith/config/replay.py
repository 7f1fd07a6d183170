"""Configuration of ``oarsmith replay``: one kept training step, run again."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .base import Int, JobConfig
from .groups import Dtype


class ReplayConfig(JobConfig):
    """All keys of ``oarsmith replay``."""

    title: ClassVar[str] = "Replay"
    command: ClassVar[str] = "replay"
    positional: ClassVar[tuple[str, ...]] = ("step_dir",)

    step_dir: str = Field(description="A failure-step-N or spike-step-N folder of a run.")
    dtype: Dtype = Field(
        "auto",
        description="Number format to run it in. auto: that of the run. A step that is sound in fp32 overflowed; one "
        "that is not has bad data or bad weights.",
    )
    document: Int | None = Field(
        None, ge=0, description="Only this document of the step, counted from 0 as in documents.jsonl."
    )
    kernels: Literal["auto", "torch", "native"] | None = Field(
        None, description="Which implementation of the fast operations. Not given: that of the run."
    )
    num_threads: Int | None = Field(
        None, ge=1, description="CPU threads. Not given: as many as the run had, or sums would differ in the last bits."
    )
    output_file: str | None = Field(None, description="Where the statistics go as JSON.")
