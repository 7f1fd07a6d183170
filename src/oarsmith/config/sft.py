"""Configuration of ``oarsmith sft``: supervised fine-tuning, of all weights or with LoRA."""

from __future__ import annotations

from typing import ClassVar

from .adapters import AdapterKeys
from .groups import DataKeys, EvalRowKeys, ModelKeys, PackingKeys
from .train import TrainConfig


class SftConfig(ModelKeys, DataKeys, AdapterKeys, PackingKeys, EvalRowKeys, TrainConfig):
    """All keys of a supervised fine-tuning run."""

    title: ClassVar[str] = "Fine-tuning"
    command: ClassVar[str] = "sft"
    positional: ClassVar[tuple[str, ...]] = ("model_name_or_path", "dataset_name_or_path")
