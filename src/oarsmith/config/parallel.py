"""How a training run is spread over processes, under the names of PaddleNLP and torchrun."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from .base import Int, JobConfig


def _to_degree(value: object) -> object:
    """PaddleNLP writes -1 (or 0) for an axis that is not used."""
    return 1 if value in (-1, 0, "-1", "0") else value


def _to_stage(value: object) -> object:
    """Nothing and false are none."""
    text = str(value).strip().lower()
    return "none" if text in ("", "false", "none", "0") else text


Degree = Annotated[Int, BeforeValidator(_to_degree)]
Stage = Annotated[Literal["none", "stage1", "stage2", "stage3"], BeforeValidator(_to_stage)]


class LaunchKeys(JobConfig):
    title: ClassVar[str] = "Processes"

    nproc_per_node: Int = Field(
        1, ge=1, description="Processes to start on this machine: one a GPU, or some on a CPU. 1: this one alone."
    )
    nnodes: str = Field(
        "1",
        pattern=r"^[1-9]\d*(:[1-9]\d*)?$",
        description="Machines that take part; 'MIN:MAX' lets the run go on with fewer. Start the same command on each.",
    )
    rdzv_endpoint: str | None = Field(
        None, description="host:port of the machine where all of them meet. Needed with several machines."
    )
    max_restarts: Int = Field(
        0, ge=0, description="How often all processes start again after one has failed; they go on from the checkpoint."
    )
    ddp_timeout: Int = Field(
        600, ge=1, description="Seconds to wait for another process before the run ends with an error."
    )


class ParallelKeys(LaunchKeys):
    title: ClassVar[str] = "Parallel training"

    data_parallel_degree: Int = Field(
        -1, ge=-1, description="Whole copies of the model, each with batches of its own. -1: what the others leave."
    )
    sharding: Stage = Field(
        "none",
        description="Split over processes: stage1 the optimizer's states, stage2 gradients too, stage3 weights too.",
    )
    sharding_parallel_degree: Int = Field(
        -1, ge=-1, description="Processes that one copy is split over. -1: all that are left."
    )
    tensor_parallel_degree: Degree = Field(
        1,
        ge=1,
        description="Processes that heads and columns are split over. Not built yet: 1 in a run of several.",
    )
    context_parallel_degree: Degree = Field(
        1,
        ge=1,
        description="Processes that the tokens of a stream are split over. Not built yet: 1 in a run of several.",
    )
    pipeline_parallel_degree: Degree = Field(
        1, ge=1, description="Processes that the layers are dealt out to. Not built yet: 1 in a run of several."
    )

    @property
    def spreads(self) -> bool:
        """Whether this process is to start others."""
        return self.nproc_per_node > 1 or self.nnodes != "1"


# What says how the work is split; none of it changes a number.
LAYOUT_KEYS = (
    "data_parallel_degree",
    "sharding",
    "sharding_parallel_degree",
    "tensor_parallel_degree",
    "context_parallel_degree",
    "pipeline_parallel_degree",
)
