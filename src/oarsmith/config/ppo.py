"""Configuration of ``oarsmith ppo``: a policy, a critic, a reference and rewards."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .base import Bool, Float, Int, JobConfig
from .policy import Aggregation, PolicyConfig, SurrogateKeys


class PpoKeys(SurrogateKeys):
    title: ClassVar[str] = "PPO"

    kl_coeff: Float = Field(
        0.02, ge=0, description="Taken from each token's reward: this times log p - log p of the reference (k1)."
    )
    kl_target: Float | None = Field(
        None,
        gt=0,
        description="KL of an answer to the reference, in nats, that kl_coeff is moved towards (adaptive KL). Not "
        "given: kl_coeff stays.",
    )
    kl_horizon: Int = Field(10_000, ge=1, description="kl_target: answers over which kl_coeff follows.")
    clip_range_ratio: Float = Field(0.2, gt=0, lt=1, description="A ratio counts between 1 minus and 1 plus this.")
    clip_range_score: Float | None = Field(
        10.0, gt=0, description="Scores are held within plus and minus this; null: they are not."
    )
    clip_range_value: Float | None = Field(
        5.0, gt=0, description="The critic's values move no more than this from the old ones; null: they may."
    )
    gamma: Float = Field(1.0, gt=0, le=1, description="GAE: discount of later rewards.")
    gae_lambda: Float = Field(0.95, ge=0, le=1, description="GAE: 1 trusts rewards alone, 0 the critic.")
    value_coeff: Float = Field(1.0, gt=0, description="Weight of the critic's loss beside the policy's.")
    normalize_reward: Bool = Field(
        False, description="Scores become (r - mean) / deviation of all scores so far, before they are clipped."
    )
    normalize_advantage: Bool = Field(True, description="Advantages of all tokens get mean 0 and deviation 1.")
    no_end_penalty: Float = Field(0.0, ge=0, description="Taken from the score of an answer that the limit ended.")
    ptx_datasets: str | None = Field(
        None,
        description="Conversations that are learned as they are beside the answers (PTX), so that nothing else is "
        "forgotten: rows as for oarsmith sft.",
    )
    ptx_coeff: Float = Field(16.0, ge=0, description="Weight of their loss.")
    ptx_max_length: Int = Field(1024, ge=4, description="Tokens of these texts in one pass.")
    loss_aggregation: Aggregation = Field(
        "token-mean", description="Whether every token counts alike, every answer, or sums of answers do."
    )


class CriticKeys(JobConfig):
    title: ClassVar[str] = "Critic"

    critic: Literal["separate", "shared"] | None = Field(
        None,
        description="separate: a model of its own. shared: a linear head on the policy's states, whose loss trains the "
        "policy's trunk too. Not given: separate where critic_model_name_or_path is, else shared.",
    )
    critic_model_name_or_path: str | None = Field(
        None,
        description="What a separate critic begins from: a reward model, or a model that writes, which gets a new "
        "head. Not given: the model that is trained.",
    )
    critic_learning_rate: Float | None = Field(
        None,
        gt=0,
        description="Highest learning rate of the critic. Not given: 5e-6, for a shared one 1e-3 (its head alone).",
    )
    critic_lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="How it falls; see lr_scheduler_type."
    )
    critic_warmup_ratio: Float = Field(0.0, ge=0, lt=1, description="The critic's warmup as a share of all steps.")
    critic_min_learning_rate: Float = Field(
        0.0, ge=0, description="The critic's rate at the end of a falling schedule."
    )
    critic_weight_decay: Float = Field(0.0, ge=0, description="The critic's weight decay.")
    critic_recompute: Bool = Field(False, description="Activation checkpointing in a separate critic; see recompute.")


class PpoConfig(PpoKeys, CriticKeys, PolicyConfig):
    """All keys of ``oarsmith ppo``: a critic says how much better a token made things."""

    title: ClassVar[str] = "PPO"
    command: ClassVar[str] = "ppo"

    samples_per_prompt: Int = Field(1, ge=1, description="Answers drawn to each prompt.")
    prompts_per_step: Int = Field(32, ge=1, description="Prompts of a rollout.")
    output_dir: str = Field("runs/ppo", description="The run folder: checkpoints, reports, resolved configuration.")
