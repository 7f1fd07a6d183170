"""Keys of the relatives of LoRA."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .base import Float, Int, JobConfig

# LoRA and all that has its matrices A and B.
LORA_FAMILY = frozenset({"lora", "dora", "pissa", "olora", "loraga", "lorapro", "moslora", "adalora"})


class LoraFamilyKeys(JobConfig):
    title: ClassVar[str] = "Adapters"

    lora_plus_scale: Float = Field(
        1.0,
        gt=0,
        le=1e4,
        description="LoRA+: the learning rate of the matrix B is so many times that of the rest. The paper has 16.",
    )
    lora_start: Literal["uniform", "gaussian"] = Field(
        "uniform", description="LoRA: what A is drawn from at first; gaussian has the deviation 1/r."
    )
    pissa_niter: Int | None = Field(
        None,
        ge=1,
        le=1000,
        description="PiSSA: find the start by so many rounds of a subspace iteration, much faster for large models "
        "(16 is near to exact). Not given: by all singular values.",
    )
    loraga_batches: Int = Field(
        8, ge=1, description="LoRA-GA: batches the gradient is estimated on before training; they go through 10 times."
    )
    loraga_gamma: Float = Field(
        16.0, gt=0, description="LoRA-GA: the start is divided by its square root; the stable scale of the paper."
    )
    adalora_init_rank: Int | None = Field(
        None,
        ge=1,
        description="AdaLoRA: rank of every layer at first; lora_rank is the mean at the end. Not given: half more.",
    )
    adalora_tinit: Int | None = Field(
        None, ge=0, description="AdaLoRA: steps before ranks are given up. Not given: a tenth of the run."
    )
    adalora_tfinal: Int | None = Field(
        None, ge=0, description="AdaLoRA: steps after the last ranks have been given up. Not given: a third of the run."
    )
    adalora_delta_t: Int = Field(1, ge=1, description="AdaLoRA: steps between two allocations of ranks.")
    adalora_beta1: Float = Field(
        0.85, gt=0, lt=1, description="AdaLoRA: how slowly the averaged sensitivity of a weight changes."
    )
    adalora_beta2: Float = Field(
        0.85, gt=0, lt=1, description="AdaLoRA: how slowly the averaged uncertainty of that changes."
    )
    adalora_orth_weight: Float = Field(
        0.5, ge=0, description="AdaLoRA: weight of the term that keeps both matrices nearly orthonormal."
    )
