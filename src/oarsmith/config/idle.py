"""Keys that are given but mean nothing beside the other values: said once, and the run goes on.

They come with files that list everything (PaddleNLP's, Hugging Face's). What would more likely be a mistake than a
leftover is refused instead (``training_combinations.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from oarsmith import processes

from .base import JobConfig
from .checkpoints import ConvertConfig
from .dpo import DpoConfig
from .inference import CacheKeys, GenerateConfig, ModeKeys, SpeculativeKeys
from .merge import MergeConfig
from .merge_combinations import FLAGS, SEARCH, by_flags
from .parallel import LAYOUT_KEYS
from .policy import GrpoConfig, PolicyConfig
from .ppo import PpoConfig
from .preferences import ProcessKeys
from .resolved import is_given
from .reward import RewardConfig
from .train import TrainConfig

C = TypeVar("C", bound=JobConfig)


@dataclass(frozen=True)
class Idle(Generic[C]):
    """``names`` of a ``keys`` configuration mean nothing where ``when`` holds; ``why`` ends "no effect: ..."."""

    keys: type[C]
    names: tuple[str, ...]
    when: Callable[[C], bool]
    why: str


def _only_of(key: str, *losses: str) -> Idle[DpoConfig]:
    """A key that only some losses of pairs have."""
    return Idle(DpoConfig, (key,), lambda c: not set(losses) & set(c.loss_type), f"loss_type is not {losses[0]}")


IDLE: tuple[Idle[Any], ...] = (
    Idle(MergeConfig, FLAGS, lambda c: not by_flags(c), "a recipe says such numbers in its parameters"),
    Idle(MergeConfig, SEARCH, lambda c: c.search == "none", "nothing is searched"),
    Idle(MergeConfig, ("search_steps",), lambda c: c.search == "evolution", "an evolution has no steps"),
    Idle(MergeConfig, ("evaluate_rows", "evaluate_length"), lambda c: not c.evaluate, "nothing is evaluated"),
    Idle(MergeConfig, ("gate_mode", "experts_per_token"), lambda c: not c.experts, "there are no experts"),
    Idle(MergeConfig, ("adapter_tolerance",), lambda c: c.adapter_rank is None, "a model is written"),
    Idle(
        MergeConfig,
        ("copy_file_list", "chat_template", "max_shard_gb", "probe", "dtype", "out_dtype"),
        lambda c: c.adapter_rank is not None,
        "an adapter is written",
    ),
    Idle(
        TrainConfig,
        ("adam_beta1", "adam_beta2", "adam_epsilon"),
        lambda c: c.optim == "adafactor",
        "adafactor has settings of its own",
    ),
    Idle(
        TrainConfig,
        LAYOUT_KEYS,
        lambda c: processes.count() == 1 and not c.spreads,
        "how the work is split over processes; this one computes the same numbers alone",
    ),
    Idle(TrainConfig, ("scale_loss",), lambda c: c.dtype != "fp16", "only fp16 scales the loss"),
    Idle(
        TrainConfig,
        ("offload_optim",),
        lambda c: c.device == "cpu",
        "on a CPU the optimizer's state lies in the computer's memory in any case",
    ),
    Idle(TrainConfig, ("recompute_granularity",), lambda c: not c.recompute, "recompute is off"),
    Idle(TrainConfig, ("num_train_epochs",), lambda c: c.max_steps > 0, "max_steps wins"),
    Idle(TrainConfig, ("warmup_ratio",), lambda c: c.warmup_steps > 0, "warmup_steps wins"),
    Idle(
        TrainConfig,
        ("decay_steps",),
        lambda c: c.lr_scheduler_type.startswith("constant"),
        "a constant learning rate does not fall",
    ),
    _only_of("simpo_gamma", "simpo"),
    _only_of("dpop_lambda", "dpop", "dpop_added"),
    _only_of("discopop_tau", "discopop"),
    Idle(
        DpoConfig,
        ("f_alpha_divergence_coef",),
        lambda c: c.f_divergence_type != "alpha_divergence",
        "f_divergence_type is another one",
    ),
    Idle(
        RewardConfig,
        ("loss_type", "label_smoothing", "center_rewards_coefficient", "regularization"),
        lambda c: c.process_reward,
        "process_reward judges steps, not pairs",
    ),
    Idle(ProcessKeys, ("reward_tokens", "step_separator"), lambda c: not c.process_reward, "process_reward is off"),
    Idle(
        TrainConfig, ("eval_steps",), lambda c: c.evaluation_strategy != "steps", "evaluation_strategy is another one"
    ),
    Idle(TrainConfig, ("save_steps",), lambda c: c.save_strategy != "steps", "save_strategy is another one"),
    Idle(
        TrainConfig,
        ("metric_for_best_model", "greater_is_better"),
        lambda c: c.evaluation_strategy == "no",
        "no evaluation is compared with another",
    ),
    Idle(
        TrainConfig,
        ("ignore_load_lr_and_optim", "ignore_data_skip"),
        lambda c: c.resume_from_checkpoint == "none",
        "nothing is resumed",
    ),
    Idle(TrainConfig, ("logging_dir",), lambda c: "tensorboard" not in c.report_to, "it is TensorBoard's folder"),
    Idle(
        TrainConfig,
        ("run_name",),
        lambda c: not {"wandb", "mlflow"} & set(c.report_to),
        "only wandb and mlflow name their runs",
    ),
    Idle(
        PolicyConfig,
        ("gradient_accumulation_steps",),
        lambda c: c.per_device_train_batch_size is not None,
        "prompts_per_update, samples_per_prompt and per_device_train_batch_size say how an update is split",
    ),
    Idle(
        PolicyConfig, ("max_turns", "max_appended"), lambda c: c.environment is None and not c.tools, "no environment"
    ),
    Idle(PolicyConfig, ("overlong_penalty",), lambda c: c.overlong_buffer == 0, "overlong_buffer is 0"),
    Idle(GrpoConfig, ("max_gen_batches",), lambda c: not c.dynamic_sampling, "dynamic_sampling is off"),
    Idle(GrpoConfig, ("importance_sampling_cap",), lambda c: c.importance_sampling == "none", "nothing is corrected"),
    Idle(
        GrpoConfig,
        ("old_logprobs",),
        lambda c: c.max_staleness == 0 and c.kl_coeff == 0 and not c.learns_twice,
        "a rollout is learned from once, by the policy that wrote it",
    ),
    Idle(GrpoConfig, ("gamma",), lambda c: c.algorithm != "reinforce++", "algorithm is another one"),
    Idle(
        GrpoConfig,
        ("scale_rewards",),
        lambda c: c.preset.estimator not in ("group", "grpo_passk"),
        "algorithm divides by no deviation, or by its own",
    ),
    Idle(
        GrpoConfig,
        ("clip_range_ratio_low", "clip_ratio_dual", "clip_two_sided"),
        lambda c: c.preset.surrogate != "clipped",
        "algorithm has another loss than the clipped one",
    ),
    Idle(
        GrpoConfig,
        ("clip_range_ratio", "clip_range_ratio_high"),
        lambda c: c.preset.surrogate not in ("clipped", "cispo"),
        "algorithm clips no ratio",
    ),
    Idle(
        GrpoConfig,
        ("kl_estimator",),
        lambda c: c.kl_loss_coeff == 0 and c.kl_coeff == 0,
        "kl_loss_coeff and kl_coeff are 0",
    ),
    Idle(PpoConfig, ("kl_horizon",), lambda c: c.kl_target is None, "kl_target is not given"),
    Idle(PpoConfig, ("ptx_coeff", "ptx_max_length"), lambda c: c.ptx_datasets is None, "ptx_datasets is not given"),
    Idle(GenerateConfig, ("length_penalty", "early_stopping"), lambda c: c.num_beams == 1, "num_beams is 1"),
    Idle(SpeculativeKeys, ("num_draft_tokens",), lambda c: c.speculative is None, "speculative is not given"),
    Idle(SpeculativeKeys, ("ngram_min", "ngram_max"), lambda c: c.speculative != "ngram", "speculative is not ngram"),
    Idle(
        CacheKeys,
        ("cache_gib",),
        lambda c: isinstance(c, ModeKeys) and c.mode == "static",
        "a compiled package has a row of the whole context for each text",
    ),
    Idle(
        CacheKeys,
        ("cache_dtype",),
        lambda c: isinstance(c, ModeKeys) and c.mode == "static",
        "a compiled package keeps them in the type it was compiled for",
    ),
    Idle(ConvertConfig, ("gguf_type", "with_tokenizer"), lambda c: c.to != "gguf", "dst is no GGUF file"),
    Idle(ConvertConfig, ("paddle_layout",), lambda c: c.to != "paddle", "dst is not in PaddleNLP's layout"),
    Idle(ConvertConfig, ("dtype",), lambda c: c.to == "gguf", "gguf_type says it"),
    Idle(ConvertConfig, ("max_shard_gb",), lambda c: c.to == "gguf", "a GGUF file is one file"),
)


def idle_keys(config: JobConfig, provenance: Mapping[str, str]) -> dict[str, str]:
    """Keys that were given a value other than the default, in vain -> why."""
    values, fields = dict(config), type(config).model_fields
    return {
        name: line.why
        for line in IDLE
        if isinstance(config, line.keys) and line.when(config)
        for name in line.names
        if values[name] != fields[name].default and is_given(provenance[name])
    }
