"""Keys that mean nothing beside the others are named, and only those that somebody gave."""

from __future__ import annotations

import pytest

from oarsmith import cli
from oarsmith.config.checkpoints import ConvertConfig
from oarsmith.config.dpo import DpoConfig
from oarsmith.config.idle import IDLE
from oarsmith.config.inference import GenerateConfig
from oarsmith.config.load import load_config
from oarsmith.config.merge import MergeConfig
from oarsmith.config.policy import GrpoConfig
from oarsmith.config.ppo import PpoConfig
from oarsmith.config.pretrain import PretrainConfig
from oarsmith.config.reward import RewardConfig
from oarsmith.config.sft import SftConfig

CASES = [
    (SftConfig, "--data_parallel_degree 2 --sharding stage2 --sharding_parallel_degree 2", "--nproc_per_node 4"),
    (SftConfig, "--tensor_parallel_degree 2 --context_parallel_degree 2 --pipeline_parallel_degree 2", ""),
    (SftConfig, "--optim adafactor --adam_beta1 0.8 --adam_beta2 0.9 --adam_epsilon 1e-7", ""),
    (SftConfig, "--scale_loss 1024", "--dtype fp16"),
    (PretrainConfig, "--device cpu --offload_optim", "--device cuda"),
    (SftConfig, "--recompute_granularity core_attn", "--recompute"),
    (PretrainConfig, "--max_steps 7 --num_train_epochs 2", "--max_steps -1"),
    (SftConfig, "--warmup_steps 3 --warmup_ratio 0.1", "--warmup_steps 0"),
    (SftConfig, "--lr_scheduler_type constant --decay_steps 5", "--lr_scheduler_type cosine"),
    (SftConfig, "--evaluation_strategy epoch --eval_split_ratio 0.1 --eval_steps 5", "--evaluation_strategy steps"),
    (SftConfig, "--save_strategy epoch --save_steps 5", "--save_strategy steps"),
    (SftConfig, "--metric_for_best_model accuracy --greater_is_better", "--eval_split_ratio 0.1"),
    (PretrainConfig, "--resume_from_checkpoint none --ignore_data_skip --ignore_load_lr_and_optim", ""),
    (SftConfig, "--logging_dir here", "--report_to tensorboard"),
    (SftConfig, "--run_name mine", "--report_to mlflow"),
    (ConvertConfig, "--gguf_type f16 --with_tokenizer false", "--to gguf"),
    (ConvertConfig, "--paddle_layout pdparams", "--to paddle"),
    (ConvertConfig, "--to gguf --dtype fp32 --max_shard_gb 2", "--to hf"),
    (DpoConfig, "--simpo_gamma 1", "--loss_type simpo"),
    (DpoConfig, "--dpop_lambda 5", "--loss_type dpop,sft"),
    (DpoConfig, "--discopop_tau 0.1", "--loss_type discopop"),
    (DpoConfig, "--f_alpha_divergence_coef 1", "--f_divergence_type alpha_divergence"),
    (RewardConfig, "--process_reward --loss_type token-wise --label_smoothing 0.1 --regularization 0.1", ""),
    (RewardConfig, "--process_reward --center_rewards_coefficient 0.1", "--process_reward false"),
    (RewardConfig, "--reward_tokens a,b --step_separator x", "--process_reward"),
    (GenerateConfig, "--num_draft_tokens 3 --ngram_min 2 --ngram_max 5", "--speculative ngram"),
    (GenerateConfig, "--length_penalty 2 --early_stopping never", "--num_beams 2"),
    (GrpoConfig, "--per_device_train_batch_size 4 --gradient_accumulation_steps 2", ""),
    (GrpoConfig, "--max_turns 3 --max_appended 4", "--environment a.py:A"),
    (GrpoConfig, "--overlong_penalty 2", "--overlong_buffer 4"),
    (GrpoConfig, "--max_gen_batches 2", "--algorithm dapo"),
    (GrpoConfig, "--importance_sampling_cap 3", "--importance_sampling token_mask"),
    (GrpoConfig, "--gamma 0.9", "--algorithm reinforce++"),
    (GrpoConfig, "--old_logprobs trainer", "--update_iters 2"),
    (GrpoConfig, "--algorithm rloo --scale_rewards none", "--algorithm grpo"),
    (GrpoConfig, "--algorithm cispo --clip_range_ratio_low 0.1 --clip_ratio_dual 3 --clip_two_sided 4", ""),
    (GrpoConfig, "--algorithm sapo --clip_range_ratio 0.1 --clip_range_ratio_high 0.1", "--algorithm gspo"),
    (GrpoConfig, "--kl_estimator k1", "--kl_loss_coeff 0.1"),
    (PpoConfig, "--kl_horizon 3", "--kl_target 1"),
    (PpoConfig, "--ptx_coeff 3 --ptx_max_length 30", "--ptx_datasets x"),
    (GenerateConfig, "--mode static --cache_gib 2", "--mode dynamic"),
    (GenerateConfig, "--mode static --cache_dtype int8", "--mode dynamic"),
    (
        MergeConfig,
        "--weight_list 1,2 --normalize false --merge_type ties --slerp_alpha 0.2 --slerp_normalize_eps 1e-6 "
        "--slerp_dot_threshold 0.9 --ties_elect_type count --reserve_p 0.5 --rescale false --epsilon 0.1",
        "--model_path_list a,b",
    ),
    (
        MergeConfig,
        "--evaluate x --search_over t --search_range 0,2 --search_groups 2 --search_trials 3",
        "--search grid",
    ),
    (MergeConfig, "--evaluate x --search evolution --search_steps 4", "--search grid"),
    (MergeConfig, "--evaluate_rows 5 --evaluate_length 64", "--evaluate x"),
    (MergeConfig, "--gate_mode random --experts_per_token 3", "--experts [{}]"),
    (MergeConfig, "--adapter_tolerance 0.1", "--adapter_rank 4"),
    (
        MergeConfig,
        "--adapter_rank 4 --copy_file_list x --chat_template auto --max_shard_gb 2 --probe false "
        "--dtype bf16 --out_dtype bf16",
        "",
    ),
]


def load(config_class, words):
    given = words.split()
    if "rewards" in config_class.model_fields:
        given += ["--rewards", "r.py:r"]
    return load_config(config_class, None, [*config_class.positional, *given])


@pytest.mark.parametrize(("config_class", "words", "cure"), CASES)
def test_named_where_they_are_idle(config_class, words, cure):
    found = load(config_class, words)
    expected = {name for line in IDLE for name in line.names if f"--{name} " in f"{words} "}
    assert set(found.without_effect) == expected and expected
    if cure:
        kept = [word for word in words.split("--") if word.split()[:1] != cure.removeprefix("--").split()[:1]]
        assert load(config_class, "--".join(kept) + " " + cure).without_effect == {}


def test_every_line_has_a_case():
    words = " ".join(words for _, words, _ in CASES) + " "
    assert [name for line in IDLE for name in line.names if f"--{name} " not in words] == []


def test_defaults_and_derived_values_are_not_given(tmp_path):
    """Also where a run folder's file lists them all, and again in a replay of the replay."""
    found = load(SftConfig, "--max_steps 5 --run_name mine")
    assert found.config.eval_steps is not None and set(found.without_effect) == {"run_name"}
    for _ in range(2):
        found.save(tmp_path / "run.json")
        found = load_config(SftConfig, tmp_path / "run.json")
        assert set(found.without_effect) == {"run_name"}


def test_one_line_and_explained(tmp_path, capsys):
    path = tmp_path / "c.json"
    path.write_text(
        '{"model_name_or_path": "m", "dataset_name_or_path": "d", "optim": "adafactor", "adam_beta1": 0.8, '
        '"scale_loss": 2, "lazy": true}'
    )
    cli._mention(cli.load("sft", [str(path)]))
    (line,) = capsys.readouterr().err.splitlines()
    assert all(name in line for name in ("adam_beta1", "scale_loss", "lazy"))
    assert cli.main(["explain", str(path), "adam_beta1"]) == 0
    assert "effect:   none: adafactor has settings of its own" in capsys.readouterr().out
