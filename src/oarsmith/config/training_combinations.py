"""Combinations of values that no training command can run with (see ``combinations.py``)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

from .adapter_lowbit import IN_BLOCKS, WITH_ABSMAX
from .adapters import AdapterKeys
from .base import JobConfig
from .dpo import DpoConfig, JudgedConfig
from .factor_combinations import FACTORS
from .groups import EvalRowKeys, RunKeys
from .impossible import Impossible
from .lora_combinations import LORA
from .parallel_combinations import SPREAD
from .pretrain import PretrainConfig, split_shares
from .sft import SftConfig
from .train import TrainConfig
from .virtual_combinations import VIRTUAL

_LORA_KEYS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "rslora", "weight_quantize_algo", "qat")
_PROJECTION_KEYS = ("projection_rank", "projection_steps", "projection_scale")
_PROJECTED = frozenset({"galore", "apollo", "apollo_mini"})
_TRACKER_EXTRAS = {"tensorboard": "train-trackers", "wandb": "wandb", "mlflow": "mlflow"}
_GENERATED = frozenset({"bleu4", "rouge1", "rouge2", "rougel"})


def _in_vain(keys: type[JobConfig], names: tuple[str, ...], used: Callable[[Any], bool], use: str) -> Impossible[Any]:
    """Keys that mean nothing unless ``used`` holds, given all the same."""

    def given(c: JobConfig) -> bool:
        values = dict(c)
        return not used(c) and any(values[name] != keys.model_fields[name].default for name in names)

    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
    return Impossible(keys, given, f"{listed} is given, but has no effect without {use}", f"add {use}, or remove it")


def _missing_tracker(name: str, extra: str) -> Impossible[Any]:
    return Impossible(
        TrainConfig,
        lambda c: name in c.report_to and importlib.util.find_spec(name) is None,
        f"report_to {name} needs the package '{name}', which is not installed",
        f"pip install 'oarsmith[{extra}]', or set report_to to none",
    )


def _not_judged(key: str, why: str, off: str) -> Impossible[Any]:
    """A key of training on single texts, given to a command that trains on judged answers."""

    def given(c: JobConfig) -> bool:
        return bool(dict(c)[key])

    return Impossible(JudgedConfig, given, f"{key} is for oarsmith sft and pretrain: {why}", f"set {key} to {off}")


def _nothing_to_evaluate_on(c: SftConfig) -> bool:
    one_file = os.path.isfile(c.dataset_name_or_path)
    wanted = c.evaluation_strategy != "no" or c.do_eval is True
    return wanted and one_file and c.eval_dataset_path is None and c.eval_split_ratio == 0


TRAINING: tuple[Impossible[Any], ...] = (
    *FACTORS,
    *LORA,
    *VIRTUAL,
    *SPREAD,
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
    Impossible(TrainConfig, lambda c: c.max_steps == 0, "max_steps is 0", "give -1 (by epochs) or at least 1"),
    Impossible(
        TrainConfig,
        lambda c: c.learning_rate is not None and c.min_learning_rate > c.learning_rate,
        "min_learning_rate {min_learning_rate} is above learning_rate {learning_rate}",
        "lower min_learning_rate",
    ),
    Impossible(
        TrainConfig,
        lambda c: c.lr_scheduler_type.startswith("constant") and c.min_learning_rate > 0,
        "a {lr_scheduler_type} schedule never reaches min_learning_rate {min_learning_rate}",
        "choose linear or cosine, or remove min_learning_rate",
    ),
    Impossible(
        TrainConfig,
        lambda c: 0 < c.max_steps <= c.warmup_steps,
        "the warmup ({warmup_steps} steps) is not shorter than the run ({max_steps} steps)",
        "lower warmup_steps",
    ),
    _in_vain(AdapterKeys, _LORA_KEYS, lambda c: c.has_adapter, "lora true (all weights would be trained)"),
    _in_vain(
        AdapterKeys,
        ("weight_blocksize",),
        lambda c: c.weight_quantize_algo in IN_BLOCKS,
        "weight_quantize_algo nf4, fp4 or weight_only_int4",
    ),
    _in_vain(
        AdapterKeys,
        ("weight_double_quant",),
        lambda c: c.weight_quantize_algo in WITH_ABSMAX,
        "weight_quantize_algo nf4 or fp4",
    ),
    _in_vain(
        AdapterKeys,
        ("weight_double_quant_block_size",),
        lambda c: c.weight_double_quant,
        "weight_double_quant true",
    ),
    _in_vain(TrainConfig, ("muon_momentum",), lambda c: c.optim == "muon", "optim muon"),
    _in_vain(TrainConfig, _PROJECTION_KEYS, lambda c: c.optim in _PROJECTED, "optim galore or apollo"),
    _in_vain(TrainConfig, ("power",), lambda c: c.lr_scheduler_type == "polynomial", "lr_scheduler_type polynomial"),
    _in_vain(TrainConfig, ("num_cycles",), lambda c: c.lr_scheduler_type == "cosine", "lr_scheduler_type cosine"),
    _in_vain(
        TrainConfig,
        ("wsd_decay_steps", "wsd_decay_style"),
        lambda c: c.lr_scheduler_type == "wsd",
        "lr_scheduler_type wsd",
    ),
    _in_vain(TrainConfig, ("neftune_noise_alpha",), lambda c: c.neftune, "neftune true"),
    _in_vain(TrainConfig, ("no_recompute_layers",), lambda c: c.recompute, "recompute true"),
    _in_vain(TrainConfig, ("ssa_group_size_ratio",), lambda c: c.use_ssa, "use_ssa true"),
    _in_vain(
        TrainConfig, ("early_stopping_threshold",), lambda c: c.early_stopping_patience > 0, "early_stopping_patience"
    ),
    _in_vain(
        EvalRowKeys, ("save_generation_output",), lambda c: c.eval_with_do_generation, "eval_with_do_generation true"
    ),
    Impossible(
        SftConfig,
        lambda c: c.metric_for_best_model in _GENERATED and not c.eval_with_do_generation,
        "{metric_for_best_model} compares generated answers, but evaluations do not generate",
        "set eval_with_do_generation to true",
    ),
    Impossible(
        JudgedConfig,
        lambda c: c.metric_for_best_model not in ("loss", "accuracy"),
        "{metric_for_best_model} is a number of single texts, and evaluations here are of judged answers",
        "set metric_for_best_model to loss or accuracy",
    ),
    Impossible(
        DpoConfig,
        lambda c: c.ref_model_update_steps > 0 and c.ignore_data_skip,
        "what the reference has become is kept with the place in the data, which ignore_data_skip leaves",
        "set ref_model_update_steps to -1, or ignore_data_skip to false",
    ),
    _not_judged("z_loss", "preference losses look at no softmax alone", "0"),
    _not_judged("use_ssa", "its groups follow a text's whole length, so answers could not share a prompt", "false"),
    _not_judged("use_pose_convert", "answers go on where their prompt ends", "false"),
    Impossible(
        PretrainConfig,
        lambda c: c.metric_for_best_model in _GENERATED,
        "{metric_for_best_model} compares answers, and a corpus has none",
        "set metric_for_best_model to loss",
    ),
    Impossible(
        TrainConfig,
        lambda c: c.optimizer_in_backward and (c.max_grad_norm > 0 or c.gradient_accumulation_steps > 1),
        "optimizer_in_backward frees each gradient at once, so gradients can be neither clipped by their norm "
        "(max_grad_norm {max_grad_norm}) nor added up over passes (gradient_accumulation_steps "
        "{gradient_accumulation_steps})",
        "set max_grad_norm to 0 and gradient_accumulation_steps to 1",
    ),
    Impossible(
        TrainConfig,
        lambda c: c.optimizer_in_backward and c.dtype == "fp16",
        "fp16 skips a step whose gradients overflow, which optimizer_in_backward knows too late",
        "use dtype bf16 or fp32, or remove optimizer_in_backward",
    ),
    Impossible(
        SftConfig,
        lambda c: c.has_adapter and c.optim in _PROJECTED,
        "{optim} projects the gradients of whole weights; an adapter's matrices are small already",
        "set optim to adamw, or train without an adapter",
    ),
    Impossible(
        SftConfig,
        lambda c: c.weight_quantize_algo == "a8w8linear" and c.dtype == "fp16",
        "weight_quantize_algo {weight_quantize_algo} computes the rest in bf16 or fp32",
        "set dtype to auto",
    ),
    Impossible(
        TrainConfig,
        lambda c: (c.rope_scaling_type == "none") != (c.rope_scaling_factor == 1.0),
        "rope_scaling_type {rope_scaling_type} and rope_scaling_factor {rope_scaling_factor} do not go together",
        "give both (rope_scaling_type yarn, rope_scaling_factor 4) or neither",
    ),
    Impossible(
        TrainConfig,
        lambda c: c.use_pose_convert and c.rope_scaling_type == "none",
        "use_pose_convert spreads positions over a stretched context, but nothing stretches it",
        "give rope_scaling_type and rope_scaling_factor",
    ),
    Impossible(
        TrainConfig,
        lambda c: 0 < c.max_steps < (c.decay_steps or 0),
        "the rate would fall until step {decay_steps}, after the end of the run ({max_steps} steps)",
        "lower decay_steps",
    ),
    Impossible(
        TrainConfig,
        lambda c: c.decay_steps is not None and c.decay_steps <= c.warmup_steps,
        "the warmup ({warmup_steps} steps) is not over when the fall ends (decay_steps {decay_steps})",
        "raise decay_steps or lower warmup_steps",
    ),
    Impossible(
        TrainConfig,
        lambda c: c.early_stopping_patience > 0 and c.evaluation_strategy == "no",
        "early_stopping_patience counts evaluations, but evaluation_strategy is no",
        "set evaluation_strategy to steps or epoch",
    ),
    Impossible(
        PretrainConfig,
        lambda c: c.evaluation_strategy != "no" and split_shares(c.split)[1] == 0,
        "an evaluation is asked for, but split {split} leaves no documents for it",
        "give split a second part (949,50,1), or set evaluation_strategy to no",
    ),
    Impossible(
        PretrainConfig,
        lambda c: c.do_predict and split_shares(c.split)[2] == 0,
        "do_predict scores the test part, but split {split} leaves no documents for it",
        "give split a third part (949,50,1), or set do_predict to false",
    ),
    Impossible(
        PretrainConfig,
        lambda c: c.do_train and split_shares(c.split)[0] == 0,
        "split {split} leaves no documents to train on",
        "give split a first part (949,50,1)",
    ),
    Impossible(
        PretrainConfig,
        lambda c: c.num_hidden_layers is not None and c.continue_training is True,
        "num_hidden_layers changes a model from scratch, but continue_training is true",
        "remove one of them",
    ),
    Impossible(
        EvalRowKeys,
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
        SftConfig,
        lambda c: c.do_predict and os.path.isfile(c.dataset_name_or_path),
        "do_predict scores a test.* file beside the training rows, but {dataset_name_or_path} is one file",
        "give a folder with train.* and test.* files, or set do_predict to false",
    ),
    Impossible(
        TrainConfig,
        lambda c: c.load_best_model_at_end and c.evaluation_strategy == "no",
        "load_best_model_at_end needs evaluations, but evaluation_strategy is no",
        "set evaluation_strategy to {save_strategy}",
    ),
    Impossible(
        TrainConfig,
        lambda c: c.load_best_model_at_end and c.evaluation_strategy != c.save_strategy,
        "load_best_model_at_end needs a checkpoint at every evaluation, but evaluation_strategy is "
        "{evaluation_strategy} "
        "and save_strategy is {save_strategy}",
        "set save_strategy to {evaluation_strategy}",
    ),
    Impossible(
        TrainConfig,
        lambda c: (
            c.load_best_model_at_end
            and c.evaluation_strategy == "steps"
            and c.eval_steps is not None
            and c.save_steps % c.eval_steps != 0
        ),
        "load_best_model_at_end needs an evaluation at every checkpoint, but save_steps {save_steps} is not a multiple "
        "of eval_steps {eval_steps}",
        "change one of them",
    ),
    *(_missing_tracker(name, extra) for name, extra in _TRACKER_EXTRAS.items()),
)
