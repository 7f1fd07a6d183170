"""Keys whose value follows from other keys when nobody gives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .base import JobConfig
from .groups import LoraKeys, ModelKeys, PackingKeys, SamplingKeys
from .sft import SftConfig

C = TypeVar("C", bound=JobConfig)


@dataclass(frozen=True)
class Rule(Generic[C]):
    """``key`` of a ``keys`` configuration, where None, becomes ``value(config)``; ``reason`` tells the user why."""

    keys: type[C]
    key: str
    value: Callable[[C], Any]
    reason: str


def _evaluation_strategy(c: SftConfig) -> str:
    return "epoch" if c.eval_dataset_path or c.eval_split_ratio > 0 else "no"


def _decode_strategy(c: SamplingKeys) -> str:
    drawn = bool(c.temperature) or (c.temperature is None and (c.top_k > 0 or c.top_p < 1))
    return "sampling" if drawn else "greedy"


# In order: a later rule sees what an earlier one derived.
RULES: tuple[Rule[Any], ...] = (
    Rule(ModelKeys, "tokenizer_name_or_path", lambda c: c.model_name_or_path, "the model's own"),
    Rule(
        PackingKeys,
        "per_device_train_batch_size",
        lambda c: 1 if c.zero_padding else 8,
        "1 packed row, or 8 samples without packing",
    ),
    Rule(SftConfig, "learning_rate", lambda c: 2e-4 if c.lora else 2e-5, "2e-4 with lora, 2e-5 without"),
    Rule(SftConfig, "evaluation_strategy", _evaluation_strategy, "epoch where eval data is named, else no"),
    Rule(SftConfig, "do_eval", lambda c: c.evaluation_strategy != "no", "true where there is an evaluation_strategy"),
    Rule(SftConfig, "eval_steps", lambda c: c.logging_steps, "as logging_steps"),
    Rule(SftConfig, "greater_is_better", lambda c: c.metric_for_best_model == "accuracy", "true for accuracy only"),
    Rule(SftConfig, "logging_dir", lambda c: f"{c.output_dir}/tensorboard", "a folder in output_dir"),
    Rule(
        LoraKeys,
        "lora_alpha",
        lambda c: (4.0 if c.rslora else 2.0 * c.lora_rank) if c.lora else None,
        "2 x lora_rank, or 4 with rslora; none without lora",
    ),
    Rule(SamplingKeys, "decode_strategy", _decode_strategy, "sampling if temperature, top_k or top_p asks for it"),
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
