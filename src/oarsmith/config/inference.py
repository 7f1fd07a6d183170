"""Configurations of ``oarsmith generate`` and ``oarsmith chat``."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from .base import Bool, Int, JobConfig
from .groups import ModelKeys, RuntimeKeys, SamplingKeys


class AdapterKeys(JobConfig):
    title: ClassVar[str] = "Adapter"

    adapter: str | None = Field(None, description="A LoRA adapter (PEFT layout) or a run folder that holds one.")


class GenerateConfig(ModelKeys, AdapterKeys, SamplingKeys, RuntimeKeys):
    """All keys of ``oarsmith generate``: answer one prompt, or a file of prompts into a file."""

    title: ClassVar[str] = "Input and output"
    command: ClassVar[str] = "generate"
    positional: ClassVar[tuple[str, ...]] = ("model_name_or_path", "prompt")

    prompt: str | None = Field(None, description="What to answer.")
    input_file: str | None = Field(
        None, description="Rows to answer (jsonl, json, csv, parquet; any format that training reads)."
    )
    output_file: str | None = Field(None, description="Where the answers to input_file go, one JSON object a line.")
    batch_size: Int = Field(8, ge=1, description="Rows of input_file answered at the same time.")
    stream: Bool = Field(True, description="Print a single answer while it is made.")


class ChatConfig(ModelKeys, AdapterKeys, SamplingKeys, RuntimeKeys):
    """All keys of ``oarsmith chat``: a conversation in the terminal."""

    title: ClassVar[str] = "Conversation"
    command: ClassVar[str] = "chat"
    positional: ClassVar[tuple[str, ...]] = ("model_name_or_path",)

    stream: Bool = Field(True, description="Print the answer while it is made.")
