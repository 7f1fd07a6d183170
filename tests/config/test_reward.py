"""Files of PaddleNLP's and TRL's reward models: every key is honoured, without effect for a reason, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from oarsmith.config.load import load_config
from oarsmith.config.reward import RewardConfig
from oarsmith.errors import ConfigError

# PaddleNLP's, for its FlashMask reward models; the older ones and those of steps have more.
SUITE: dict[str, Any] = {
    "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
    "train_dataset_path": "./data/train.jsonl",
    "dev_dataset_path": "./data/dev.jsonl",
    "output_dir": "./checkpoints/rm_ckpts",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "per_device_eval_batch_size": 1,
    "num_train_epochs": 1,
    "max_steps": 100,
    "learning_rate": 1e-06,
    "warmup_steps": 10,
    "logging_steps": 1,
    "evaluation_strategy": "steps",
    "save_strategy": "steps",
    "eval_steps": 100,
    "save_steps": 500,
    "max_seq_len": 4096,
    "max_prompt_len": 2048,
    "bf16": True,
    "fp16_opt_level": "O2",
    "do_train": True,
    "do_eval": True,
    "disable_tqdm": True,
    "load_best_model_at_end": True,
    "tensor_parallel_degree": 8,
    "sharding": "stage1",
    "sharding_parallel_degree": 1,
    "use_flash_attention": True,
    "flash_mask": True,
    "recompute": False,
    "recompute_granularity": "full",
    "unified_checkpoint": True,
    "greedy_zero_padding": False,
    "lazy": False,
}
OLDER = {
    "loss_type": "token-wise",
    "regularization": 0.001,
    "normalize_score_during_training": False,
    "normalizer_type": "RunningMeanStd",
    "momentum": 0.9,
}
STEPS = {"process_reward": True, "placeholder_token": "ки", "reward_tokens": ["+", "-"]}


def read(tmp_path: Path, values: dict[str, Any]) -> Any:
    file = tmp_path / "reward.json"
    file.write_text(json.dumps(values))
    return load_config(RewardConfig, file)


def test_the_suite_s_files_run_unchanged(tmp_path: Path) -> None:
    resolved = read(tmp_path, SUITE)
    config = resolved.config
    assert (config.max_length, config.max_prompt_len, config.learning_rate) == (4096, 2048, 1e-6)
    assert (config.loss_type, config.regularization, config.process_reward) == ("sequence-wise", 0.0, False)
    assert {"tensor_parallel_degree", "flash_mask", "lazy"} <= set(resolved.without_effect)
    older = read(tmp_path, {**SUITE, **OLDER})
    assert (older.config.loss_type, older.config.regularization) == ("token-wise", 0.001)
    assert {"normalizer_type", "momentum"} <= set(older.without_effect)
    steps = read(tmp_path, {**SUITE, **STEPS}).config
    assert (steps.process_reward, steps.step_separator, steps.reward_tokens) == (True, "ки", ("+", "-"))


def test_trl_s_keys(tmp_path: Path) -> None:
    values = {"model_name_or_path": "m", "dataset": "d", "center_rewards_coefficient": 0.01, "max_length": 1024}
    config = read(tmp_path, {**values, "gradient_checkpointing": True, "disable_dropout": True}).config
    assert (config.center_rewards_coefficient, config.max_length, config.recompute) == (0.01, 1024, True)


def test_rates_and_refusals(tmp_path: Path) -> None:
    few = {"model_name_or_path": "m", "dataset_name_or_path": "d"}
    assert read(tmp_path, few).config.learning_rate == 1e-5
    assert read(tmp_path, {**few, "lora": True}).config.learning_rate == 1e-4
    for wrong, part in (
        ({"normalize_score_during_training": True}, "not built yet"),
        ({"beta": 0.2}, "belongs to"),
        ({"loss_type": "pairwise"}, "sequence-wise"),
        ({"label_smoothing": 1}, "label_smoothing"),
    ):
        with pytest.raises(ConfigError, match=part):
            read(tmp_path, {**few, **wrong})
