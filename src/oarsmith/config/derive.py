"""Keys whose value follows from other keys when nobody gives it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .adapter_factors import ALPHA_IS_RANK, OWN_PLACES, WITHOUT_ALPHA
from .adapter_virtual import PART_RATES, PARTS
from .adapters import AdapterKeys, SharedAdapterKeys
from .base import JobConfig
from .dpo import JudgedConfig
from .groups import ModelKeys, SamplingKeys
from .policy import GrpoConfig, PolicyConfig
from .ppo import PpoConfig
from .pretrain import PretrainConfig, split_shares
from .reward import RewardConfig
from .sft import SftConfig
from .train import TrainConfig

C = TypeVar("C", bound=JobConfig)


@dataclass(frozen=True)
class Rule(Generic[C]):
    """``key`` of a ``keys`` configuration, where None, becomes ``value(config)``; ``reason`` tells the user why."""

    keys: type[C]
    key: str
    value: Callable[[C], Any]
    reason: str


def _evaluation_strategy(c: SftConfig | JudgedConfig) -> str:
    return "epoch" if c.eval_dataset_path or c.eval_split_ratio > 0 else "no"


def _policy_evaluation(c: PolicyConfig) -> str:
    return "steps" if c.eval_dataset_path or c.eval_split_ratio > 0 else "no"


def _corpus_evaluation(c: PretrainConfig) -> str:
    """Steps where the split leaves documents for it."""
    return "steps" if split_shares(c.split)[1] > 0 else "no"


def _projection_scale(c: TrainConfig) -> float | None:
    return {"galore": 0.25, "apollo": 1.0, "apollo_mini": 128**0.5}.get(c.optim)


def _projection_rank(c: TrainConfig) -> int | None:
    return {"galore": 128, "apollo": 128, "apollo_mini": 1}.get(c.optim)


def _lora_alpha(c: AdapterKeys) -> float | None:
    if not c.has_adapter or c.adapter_type in WITHOUT_ALPHA | PARTS:
        return None
    if c.adapter_type in ALPHA_IS_RANK or c.adapter_type in ("pissa", "olora"):
        return float(c.lora_rank)
    if c.adapter_type == "loraga":
        return 16.0
    return 4.0 if c.rslora else 2.0 * c.lora_rank


def _decode_strategy(c: SamplingKeys) -> str:
    drawn = bool(c.temperature) or (c.temperature is None and c.asks_for_draws)
    return "sampling" if drawn else "greedy"


def _rate(config: type[SftConfig] | type[JudgedConfig] | type[PolicyConfig], adapter: float, whole: float) -> Rule[Any]:
    def rate(c: SftConfig | JudgedConfig | PolicyConfig) -> float:
        return PART_RATES.get(c.adapter_type or "", adapter) if c.has_adapter else whole

    words = f"{_short(adapter)} with an adapter, more for those that change no projections, {_short(whole)} without"
    return Rule(config, "learning_rate", rate, words)


def _short(number: float) -> str:
    return f"{number:.0e}".replace("e-0", "e-")


def _batch_size(config: type[SftConfig] | type[JudgedConfig], alone: str) -> Rule[Any]:
    def size(c: SftConfig | JudgedConfig) -> int:
        return 1 if c.zero_padding else 8

    return Rule(config, "per_device_train_batch_size", size, f"1 packed row, or 8 {alone} without packing")


# In order: a later rule sees what an earlier one derived.
RULES: tuple[Rule[Any], ...] = (
    Rule(ModelKeys, "tokenizer_name_or_path", lambda c: c.model_name_or_path, "the model's own"),
    _batch_size(SftConfig, "samples"),
    Rule(PretrainConfig, "per_device_train_batch_size", lambda c: 8, "8 rows"),
    Rule(SharedAdapterKeys, "adapter_type", lambda c: "lora" if c.lora else "none", "lora with lora true, else none"),
    _rate(SftConfig, 2e-4, 2e-5),
    Rule(SftConfig, "evaluation_strategy", _evaluation_strategy, "epoch where eval data is named, else no"),
    _batch_size(JudgedConfig, "prompts"),
    _rate(RewardConfig, 1e-4, 1e-5),
    _rate(JudgedConfig, 5e-5, 1e-6),
    Rule(JudgedConfig, "evaluation_strategy", _evaluation_strategy, "epoch where eval data is named, else no"),
    _rate(PolicyConfig, 1e-5, 1e-6),
    Rule(PolicyConfig, "evaluation_strategy", _policy_evaluation, "steps where eval data is named, else no"),
    Rule(PolicyConfig, "eval_steps", lambda c: max(20, c.logging_steps), "20, or logging_steps if more"),
    Rule(
        GrpoConfig, "clip_range_ratio_low", lambda c: c.clip_range_ratio or c.preset.clip_low, "as the algorithm has it"
    ),
    Rule(
        GrpoConfig,
        "clip_range_ratio_high",
        lambda c: c.clip_range_ratio or c.preset.clip_high,
        "as the algorithm has it",
    ),
    Rule(
        PpoConfig,
        "critic",
        lambda c: "separate" if c.critic_model_name_or_path else "shared",
        "separate where critic_model_name_or_path is given, else shared",
    ),
    Rule(
        PpoConfig,
        "critic_learning_rate",
        lambda c: 5e-6 if c.critic == "separate" else 1e-3,
        "5e-6 for a critic of its own, 1e-3 for a head",
    ),
    Rule(GrpoConfig, "loss_aggregation", lambda c: c.preset.aggregation, "as the algorithm has it"),
    Rule(GrpoConfig, "scale_rewards", lambda c: c.preset.scale, "as the algorithm has it"),
    Rule(GrpoConfig, "dynamic_sampling", lambda c: c.preset.dynamic, "as the algorithm has it"),
    Rule(GrpoConfig, "filter_truncated", lambda c: c.preset.filter_truncated, "as the algorithm has it"),
    Rule(PretrainConfig, "evaluation_strategy", _corpus_evaluation, "steps where split has a part for it, else no"),
    Rule(TrainConfig, "do_eval", lambda c: c.evaluation_strategy != "no", "true where there is an evaluation_strategy"),
    Rule(PretrainConfig, "eval_steps", lambda c: max(100, c.logging_steps), "100, or logging_steps if more"),
    Rule(TrainConfig, "eval_steps", lambda c: c.logging_steps, "as logging_steps"),
    Rule(
        TrainConfig,
        "greater_is_better",
        lambda c: c.metric_for_best_model not in ("loss", "perplexity"),
        "false for loss and perplexity, else true",
    ),
    Rule(TrainConfig, "logging_dir", lambda c: f"{c.output_dir}/tensorboard", "a folder in output_dir"),
    Rule(TrainConfig, "run_name", lambda c: os.path.basename(os.path.normpath(c.output_dir)), "output_dir's name"),
    Rule(TrainConfig, "projection_rank", _projection_rank, "128, 1 for apollo_mini; none for other optimizers"),
    Rule(TrainConfig, "projection_scale", _projection_scale, "the papers' values; none for other optimizers"),
    Rule(
        AdapterKeys,
        "lora_alpha",
        _lora_alpha,
        "2 x lora_rank, 4 with rslora; what its description says for other methods; none where there is no such scale",
    ),
    Rule(
        AdapterKeys,
        "lora_target_modules",
        lambda c: "all-linear" if c.has_adapter and c.adapter_type not in OWN_PLACES | PARTS else None,
        "all-linear; ia3 and bottleneck have places of their own, and some methods sit elsewhere",
    ),
    Rule(SamplingKeys, "decode_strategy", _decode_strategy, "sampling if another key asks for it"),
    Rule(
        SamplingKeys,
        "temperature",
        lambda c: 0.7 if c.decode_strategy == "sampling" else None,
        "0.7 when sampling, none when greedy",
    ),
)


def rule_for(config_class: type[JobConfig], key: str) -> Rule[Any] | None:
    """The rule that would set ``key`` of this job."""
    return next((rule for rule in RULES if rule.key == key and issubclass(config_class, rule.keys)), None)


def derive(config: C) -> tuple[C, dict[str, str]]:
    """Apply the rules; returns the full configuration and, per derived key, the reason."""
    reasons: dict[str, str] = {}
    for rule in RULES:
        if not isinstance(config, rule.keys) or dict(config)[rule.key] is not None:
            continue
        value = rule.value(config)
        if value is not None:
            config = type(config).model_validate({**config.model_dump(), rule.key: value})
            reasons[rule.key] = rule.reason
    return config, reasons
