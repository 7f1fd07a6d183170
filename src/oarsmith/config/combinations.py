"""Combinations of values that cannot work, found before anything heavy is imported.

Each line says when a configuration is impossible, why, and what to do; ``{key}`` stands for the value of a key.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from oarsmith.errors import ConfigError

from .base import JobConfig
from .checkpoints import ConvertConfig
from .groups import DataKeys, LoraKeys, OptimizerKeys, ProgressKeys, RunKeys, SamplingKeys
from .inference import GenerateConfig
from .sft import SftConfig

C = TypeVar("C", bound=JobConfig)


@dataclass(frozen=True)
class Impossible(Generic[C]):
    """A ``keys`` configuration for which ``when`` holds cannot run."""

    keys: type[C]
    when: Callable[[C], bool]
    reason: str
    fix: str


_LORA_DEFAULTS = {
    key: LoraKeys.model_fields[key].default
    for key in ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "rslora")
}


def _lora_keys_without_lora(c: LoraKeys) -> bool:
    return not c.lora and any(value != _LORA_DEFAULTS[key] for key, value in c if key in _LORA_DEFAULTS)


def _nothing_to_evaluate_on(c: SftConfig) -> bool:
    one_file = os.path.isfile(c.dataset_name_or_path)
    wanted = c.evaluation_strategy != "no" or c.do_eval is True
    return wanted and one_file and c.eval_dataset_path is None and c.eval_split_ratio == 0


IMPOSSIBLE: tuple[Impossible[Any], ...] = (
    Impossible(
        RunKeys,
        lambda c: int(os.environ.get("WORLD_SIZE", "1")) > 1,
        "started as one of several processes (WORLD_SIZE is set), but this version trains in one process",
        "start it without torchrun",
    ),
    Impossible(
        RunKeys,
        lambda c: not c.do_train and not c.do_eval,
        "do_train and do_eval are both false: nothing to do",
        "set one of them to true",
    ),
    Impossible(
        RunKeys,
        lambda c: c.overwrite_output_dir and c.resume_from_checkpoint not in ("auto", "none"),
        "overwrite_output_dir starts anew, resume_from_checkpoint {resume_from_checkpoint} goes on",
        "give only one of them",
    ),
    Impossible(
        DataKeys,
        lambda c: c.src_length is not None and c.src_length >= c.max_length,
        "src_length {src_length} leaves no room for an answer in max_length {max_length}",
        "lower src_length or raise max_length",
    ),
    Impossible(OptimizerKeys, lambda c: c.max_steps == 0, "max_steps is 0", "give -1 (by epochs) or at least 1"),
    Impossible(
        OptimizerKeys,
        lambda c: c.learning_rate is not None and c.min_learning_rate > c.learning_rate,
        "min_learning_rate {min_learning_rate} is above learning_rate {learning_rate}",
        "lower min_learning_rate",
    ),
    Impossible(
        OptimizerKeys,
        lambda c: c.lr_scheduler_type.startswith("constant") and c.min_learning_rate > 0,
        "a {lr_scheduler_type} schedule never reaches min_learning_rate {min_learning_rate}",
        "choose linear or cosine, or remove min_learning_rate",
    ),
    Impossible(
        OptimizerKeys,
        lambda c: 0 < c.max_steps <= c.warmup_steps,
        "the warmup ({warmup_steps} steps) is not shorter than the run ({max_steps} steps)",
        "lower warmup_steps",
    ),
    Impossible(
        LoraKeys,
        _lora_keys_without_lora,
        "LoRA keys are given but lora is false: all weights would be trained",
        "add lora true, or remove the LoRA keys",
    ),
    Impossible(
        ProgressKeys,
        lambda c: c.eval_dataset_path is not None and c.eval_split_ratio > 0,
        "both eval_dataset_path and eval_split_ratio say what to evaluate on",
        "give only one of them",
    ),
    Impossible(
        SftConfig,
        _nothing_to_evaluate_on,
        "an evaluation is asked for, but {dataset_name_or_path} is one file and no eval data is named",
        "give eval_dataset_path, or eval_split_ratio 0.05 to keep some rows out of training",
    ),
    Impossible(
        ProgressKeys,
        lambda c: c.load_best_model_at_end and c.evaluation_strategy == "no",
        "load_best_model_at_end needs evaluations, but evaluation_strategy is no",
        "set evaluation_strategy to {save_strategy}",
    ),
    Impossible(
        ProgressKeys,
        lambda c: c.load_best_model_at_end and c.evaluation_strategy != c.save_strategy,
        "load_best_model_at_end needs a checkpoint at every evaluation, but evaluation_strategy is "
        "{evaluation_strategy} "
        "and save_strategy is {save_strategy}",
        "set save_strategy to {evaluation_strategy}",
    ),
    Impossible(
        ProgressKeys,
        lambda c: (
            c.load_best_model_at_end
            and c.evaluation_strategy == "steps"
            and c.eval_steps is not None
            and c.save_steps % c.eval_steps != 0
        ),
        "load_best_model_at_end needs an evaluation at every checkpoint, but save_steps {save_steps} is not a "
        "multiple of "
        "eval_steps {eval_steps}",
        "change one of them",
    ),
    Impossible(
        ProgressKeys,
        lambda c: c.report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None,
        "report_to tensorboard needs the package 'tensorboard', which is not installed",
        "pip install 'oarsmith[train-trackers]', or set report_to to none",
    ),
    Impossible(
        SamplingKeys,
        lambda c: c.decode_strategy == "greedy" and (bool(c.temperature) or c.top_k > 0 or c.top_p < 1),
        "greedy always takes the likeliest token; temperature, top_k and top_p would have no effect",
        "remove them, or set decode_strategy to sampling",
    ),
    Impossible(
        SamplingKeys,
        lambda c: c.decode_strategy == "sampling" and c.temperature == 0,
        "sampling at temperature 0 is not defined",
        "raise temperature, or set decode_strategy to greedy",
    ),
    Impossible(
        GenerateConfig,
        lambda c: (c.prompt is None) == (c.input_file is None),
        "give a prompt or an input_file, and not both",
        "oarsmith generate MODEL 'your question', or --input_file rows.jsonl --output_file answers.jsonl",
    ),
    Impossible(
        GenerateConfig,
        lambda c: (c.input_file is None) != (c.output_file is None),
        "input_file and output_file belong together",
        "give both",
    ),
    Impossible(
        SamplingKeys,
        lambda c: c.raw and c.system is not None,
        "raw text has no chat template, so the system message would have no effect",
        "remove raw or system",
    ),
    Impossible(
        ConvertConfig,
        lambda c: os.path.abspath(c.src) == os.path.abspath(c.dst),
        "src and dst are the same place ({src})",
        "write to another directory",
    ),
)


def check_combinations(config: JobConfig, where: str | None = None) -> None:
    """Refuse a configuration that cannot work.

    Raises:
        ConfigError: the first impossible combination, with its reason and what to do.
    """
    for line in IMPOSSIBLE:
        if isinstance(config, line.keys) and line.when(config):
            values = config.model_dump()
            raise ConfigError(line.reason.format(**values), where=where, fix=line.fix.format(**values))
