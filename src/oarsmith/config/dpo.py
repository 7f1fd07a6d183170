"""Configurations of ``oarsmith dpo`` and ``oarsmith kto``: training on judged answers."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .adapters import AdapterKeys
from .base import Bool, Float, Floats, Int, JobConfig, Words
from .groups import ModelKeys
from .preferences import PreferenceDataKeys
from .train import TrainConfig


class JudgedConfig(ModelKeys, PreferenceDataKeys, AdapterKeys, TrainConfig):
    """What training on judged answers has whatever the loss."""

    title: ClassVar[str] = "Judged answers"
    positional: ClassVar[tuple[str, ...]] = ("model_name_or_path", "dataset_name_or_path")


class PairLossKeys(JobConfig):
    title: ClassVar[str] = "Preference loss"

    loss_type: Words = Field(
        ("sigmoid",),
        description="What is minimised for a pair; docs/alignment.md has the list: sigmoid (DPO), ipo, simpo, orpo, "
        "dpop, apo_zero, ... Several, separated by commas, are added up.",
    )
    loss_weights: Floats = Field((), description="A weight for each of several loss types. Not given: 1 each.")
    beta: Float = Field(0.1, gt=0, description="How strongly the model is held to the reference.")
    label_smoothing: Float = Field(
        0.0, ge=0, lt=1, description="Share of pairs that are taken to be the wrong way round."
    )
    simpo_gamma: Float = Field(
        0.5, ge=0, description="simpo: the margin that is asked for, of mean log-probabilities times beta."
    )
    dpop_lambda: Float = Field(
        50.0, ge=0, description="dpop: weight of the penalty where the chosen answer becomes less likely."
    )
    discopop_tau: Float = Field(0.05, gt=0, lt=1, description="discopop: temperature of its mixture.")
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = Field(
        "reverse_kl",
        description="The divergence that holds the model to the reference, in losses that compare log-ratios.",
    )
    f_alpha_divergence_coef: Float = Field(0.5, gt=0, description="The alpha of alpha_divergence.")
    pref_loss_ratio: Float = Field(1.0, ge=0, description="Weight of the preference loss.")
    sft_loss_ratio: Float | None = Field(
        None,
        ge=0,
        description="Weight of the chosen answers' negative log-likelihood per token. Not given: what the loss has in "
        "its paper, 1 for orpo and cpo, else 0.",
    )
    reference_free: Bool = Field(False, description="Compare with no reference.")
    ref_model_update_steps: Int = Field(
        -1,
        ge=-1,
        description="Every so many steps the model as it is becomes the reference of the steps after (TR-DPO's hard "
        "update). -1: the reference stays the model that training begins with. Evaluations compare with that one.",
    )
    use_weighting: Bool = Field(
        False, description="WPO: a pair counts by how likely the model itself makes its answers."
    )


class DpoConfig(PairLossKeys, JudgedConfig):
    """All keys of ``oarsmith dpo``: one of two answers is preferred."""

    title: ClassVar[str] = "Preference training"
    command: ClassVar[str] = "dpo"

    output_dir: str = Field("runs/dpo", description="The run folder: checkpoints, reports, resolved configuration.")


class KtoLossKeys(JobConfig):
    title: ClassVar[str] = "KTO"

    loss_type: Literal["kto", "apo_zero_unpaired"] = Field(
        "kto", description="kto: answers are held against a KL term. apo_zero_unpaired: against the reference alone."
    )
    beta: Float = Field(0.1, gt=0, description="How strongly the model is held to the reference.")
    desirable_weight: Float = Field(1.0, ge=0, description="Weight of good answers.")
    undesirable_weight: Float = Field(1.0, ge=0, description="Weight of bad answers.")


class KtoConfig(KtoLossKeys, JudgedConfig):
    """All keys of ``oarsmith kto``: single answers are good or bad."""

    title: ClassVar[str] = "KTO"
    command: ClassVar[str] = "kto"

    output_dir: str = Field("runs/kto", description="The run folder: checkpoints, reports, resolved configuration.")
