"""Configurations of the commands that rewrite weights on disk: ``convert`` and ``merge-adapter``."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .base import Bool, Float, JobConfig


class ConvertConfig(JobConfig):
    """All keys of ``oarsmith convert``."""

    title: ClassVar[str] = "Conversion"
    command: ClassVar[str] = "convert"
    positional: ClassVar[tuple[str, ...]] = ("src", "dst")

    src: str = Field(description="What to read: a GGUF file or a Hugging Face directory.")
    dst: str = Field(description="The Hugging Face directory to write.")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Number format of the written weights. auto: that of the source; quantized GGUF weights become "
        "bf16.",
    )
    overwrite: Bool = Field(False, description="Replace dst if it exists.")


class MergeAdapterConfig(JobConfig):
    """All keys of ``oarsmith merge-adapter``."""

    title: ClassVar[str] = "Merging an adapter"
    command: ClassVar[str] = "merge-adapter"
    positional: ClassVar[tuple[str, ...]] = ("adapter", "output_dir")

    adapter: str = Field(description="The adapter (PEFT layout), or a run folder that holds one.")
    model_name_or_path: str | None = Field(None, description="The base model. Not given: the one the adapter names.")
    output_dir: str | None = Field(None, description="Where the merged model goes. Not given: ADAPTER/merged.")
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Number format of the merged weights. auto: that of the base model."
    )
    kl_budget: Float = Field(
        1e-2,
        gt=0,
        description="The merge is refused if the merged model's next-token probabilities differ from base plus "
        "adapter by "
        "more than this (mean KL divergence, nats per token).",
    )
    overwrite: Bool = Field(False, description="Replace output_dir if it exists.")
