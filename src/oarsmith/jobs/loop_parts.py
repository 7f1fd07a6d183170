"""From a configuration to the parts of the training loop, for every command that trains."""

from __future__ import annotations

import math

from oarsmith.config.train import TrainConfig
from oarsmith.models.decoder import Decoder
from oarsmith.training.loop import LoopSettings
from oarsmith.training.optimizer import AdamW, AdamWSettings
from oarsmith.training.schedule import Schedule


def make_optimizer(config: TrainConfig, model: Decoder) -> AdamW:
    """AdamW over the parameters that train."""
    settings = AdamWSettings(
        beta1=config.adam_beta1, beta2=config.adam_beta2, eps=config.adam_epsilon, weight_decay=config.weight_decay
    )
    return AdamW(((name, p) for name, p in model.named_parameters() if p.requires_grad), settings)


def make_schedule(config: TrainConfig, total: int) -> Schedule:
    """The learning rate over ``total`` updates."""
    assert config.learning_rate is not None, "derived where not given"
    return Schedule(
        kind=config.lr_scheduler_type,
        peak=config.learning_rate,
        total_steps=total,
        warmup_steps=config.warmup_steps or math.ceil(config.warmup_ratio * total),
        floor=config.min_learning_rate,
    )


def loop_settings(config: TrainConfig, total: int) -> LoopSettings:
    """When to log, evaluate and save in ``total`` updates."""
    assert config.evaluation_strategy is not None and config.eval_steps is not None, "derived where not given"
    return LoopSettings(
        seed=config.seed,
        total_steps=total,
        accumulate=config.gradient_accumulation_steps,
        max_grad_norm=config.max_grad_norm,
        log_steps=config.logging_steps,
        eval_when=config.evaluation_strategy,
        eval_steps=config.eval_steps,
        save_when=config.save_strategy,
        save_steps=config.save_steps,
        best_metric=f"eval_{config.metric_for_best_model}",
        greater_is_better=bool(config.greater_is_better),
    )
