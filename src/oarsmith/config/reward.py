"""Configuration of ``oarsmith reward``: models that score answers."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .base import Float, JobConfig
from .dpo import JudgedConfig
from .preferences import ProcessKeys


class RewardLossKeys(JobConfig):
    title: ClassVar[str] = "Reward loss"

    loss_type: Literal["sequence-wise", "token-wise"] = Field(
        "sequence-wise",
        description="Where the scores of two answers are compared: at their last tokens, or at every token from the "
        "first one in which they differ (safe-rlhf).",
    )
    label_smoothing: Float = Field(
        0.0, ge=0, lt=1, description="Share of pairs that are taken to be the wrong way round."
    )
    center_rewards_coefficient: Float | None = Field(
        None, ge=0, description="Weight of the squared sum of both scores, which keeps them around 0 (TRL)."
    )
    regularization: Float = Field(
        0.0, ge=0, description="Weight of the mean of both scores' squares (PaddleNLP's older reward models: 0.001)."
    )


class RewardConfig(RewardLossKeys, ProcessKeys, JudgedConfig):
    """All keys of ``oarsmith reward``: of two answers the better one, or how good the steps of an answer are."""

    title: ClassVar[str] = "Reward models"
    command: ClassVar[str] = "reward"

    output_dir: str = Field("runs/reward", description="The run folder: checkpoints, reports, resolved configuration.")
