"""What the configurations of all commands that train have in common."""

from __future__ import annotations

from typing import ClassVar

from .groups import BatchKeys, RunKeys, RuntimeKeys
from .parallel import ParallelKeys
from .training_keys import (
    CheckpointKeys,
    EvaluationKeys,
    LogKeys,
    LongContextKeys,
    LossKeys,
    MemoryKeys,
    OptimizerKeys,
    ScheduleKeys,
)


class TrainConfig(
    RunKeys,
    BatchKeys,
    OptimizerKeys,
    ScheduleKeys,
    LossKeys,
    EvaluationKeys,
    CheckpointKeys,
    LogKeys,
    MemoryKeys,
    LongContextKeys,
    ParallelKeys,
    RuntimeKeys,
):
    """The keys of the training loop and its parts; a command adds its model, its data and its own."""

    title: ClassVar[str] = "Training"
