"""Other names of keys and values, and how near a wrong name is to a right one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Other name -> our key. An entry counts only for jobs that have the key.
ALIASES: dict[str, str] = {
    "model": "model_name_or_path",
    "model_path": "model_name_or_path",
    "base_model": "model_name_or_path",
    "tokenizer": "tokenizer_name_or_path",
    "dataset": "dataset_name_or_path",
    "train_dataset_path": "dataset_name_or_path",
    "dev_dataset_path": "eval_dataset_path",
    "eval_dataset": "eval_dataset_path",
    "val_size": "eval_split_ratio",
    "max_seq_len": "max_length",
    "max_seq_length": "max_length",
    "cutoff_len": "max_length",
    "max_prompt_len": "src_length",
    "max_prompt_length": "max_prompt_len",
    "placeholder_token": "step_separator",
    "packing": "zero_padding",
    "eval_strategy": "evaluation_strategy",
    "gradient_checkpointing": "recompute",
    "eval_iters": "max_evaluate_steps",
    "data_path": "input_dir",
    "data_prefix": "input_dir",
    "reset_attention_mask": "isolate_documents",
    "async_save": "use_async_save",
    "lr_end": "min_learning_rate",
    "json_keys": "json_key",
    "doc_splitter": "doc_spliter",
    "append_eod": "append_eos",
    "neftune_alpha": "neftune_noise_alpha",
    "strategy_name": "rope_scaling_type",
    "optimizer": "optim",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "min_lr": "min_learning_rate",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "adam_eps": "adam_epsilon",
    "sep_parallel_degree": "context_parallel_degree",
    "use_lora": "lora",
    "lora_r": "lora_rank",
    "target_r": "lora_rank",
    "init_r": "adalora_init_rank",
    "tinit": "adalora_tinit",
    "tfinal": "adalora_tfinal",
    "deltaT": "adalora_delta_t",
    "orth_reg_weight": "adalora_orth_weight",
    "loraplus_lr_ratio": "lora_plus_scale",
    "vera_rank": "lora_rank",
    "lokr_dim": "lora_rank",
    "d_initial": "vera_d_initial",
    "projection_prng_key": "vera_prng_key",
    "save_projection": "vera_save_projection",
    "decompose_both": "lokr_decompose_both",
    "feedforward_modules": "ia3_feedforward_modules",
    "n_frequency": "fourierft_frequencies",
    "random_loc_seed": "fourierft_seed",
    "coft": "oft_constrained",
    "block_share": "oft_block_share",
    "boft_block_num": "boft_blocks",
    "boft_n_butterfly_factor": "boft_factors",
    "bnb_4bit_quant_type": "weight_quantize_algo",
    "quantization_bit": "weight_quantize_algo",
    "bnb_4bit_use_double_quant": "weight_double_quant",
    "double_quantization": "weight_double_quant",
    "lora_target": "lora_target_modules",
    "target_modules": "lora_target_modules",
    "use_rslora": "rslora",
    "lora_path": "adapter",
    "prefix_path": "adapter",
    "reft_path": "adapter",
    "trainable_token_indices": "trainable_tokens",
    "token_indices": "trainable_tokens",
    "bias": "lora_bias",
    "position": "reft_position",
    "intervention_type": "reft_intervention_type",
    "act_fn": "reft_act_fn",
    "add_bias": "reft_add_bias",
    "low_rank_dimension": "lora_rank",
    "adapter_name_or_path": "adapter",
    "data_file": "input_file",
    "max_tokens": "max_new_tokens",
    "max_dec_len": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "min_dec_len": "min_new_tokens",
    "min_length": "min_new_tokens",
    "typical": "typical_p",
    "penalty_score": "repetition_penalty",
    "presence_score": "presence_penalty",
    "frequency_score": "frequency_penalty",
    "stop_token_ids": "stop_ids",
    "eos_token_ids": "stop_ids",
    "num_return_sequences": "n",
    "system_prompt": "system",
    "output_path": "output_dir",
    "quant_type": "weights",
    "quantize": "weights",
    "lora_modules": "adapters",
    "model_name": "served_model_name",
    "api_keys_file": "api_keys",
    "ssl_certfile": "tls_certfile",
    "ssl_keyfile": "tls_keyfile",
    "allowed_origins": "cors_origins",
    "max_num_seqs": "batch_size",
    "cachekv_int8_type": "cache_dtype",
    "ptq_step": "calibration_samples",
    "calibration_dataset": "calibration",
    "ignore": "skip_list_names",
    "draft_model": "speculative",
    "draft_model_name_or_path": "speculative",
    "assistant_model": "speculative",
    "speculate_method": "speculative",
    "speculate_max_draft_token_num": "num_draft_tokens",
    "num_speculative_tokens": "num_draft_tokens",
    "prompt_lookup_num_tokens": "num_draft_tokens",
    "speculate_max_ngram_size": "ngram_max",
    "prompt_lookup_max": "ngram_max",
    "prompt_lookup_min": "ngram_min",
    "actor_model_name_or_path": "model_name_or_path",
    "reward_critic_model_name_or_path": "critic_model_name_or_path",
    "reward_model_name_or_path": "rewards",
    "reward_server": "rewards",
    "reward_funcs": "rewards",
    "train_datasets": "dataset_name_or_path",
    "eval_datasets": "eval_dataset_path",
    "rl_algorithm": "algorithm",
    "rollout_n": "samples_per_prompt",
    "num_generations": "samples_per_prompt",
    "n_samples_per_prompt": "samples_per_prompt",
    "global_batch_size": "prompts_per_step",
    "per_device_prompt_batch_size": "prompts_per_step",
    "rollout_batch_size": "prompts_per_step",
    "global_mini_batch_size": "prompts_per_update",
    "num_iterations": "update_iters",
    "ppo_epochs": "update_iters",
    "num_ppo_epochs": "update_iters",
    "max_completion_length": "max_new_tokens",
    "epsilon": "clip_range_ratio",
    "epsilon_high": "clip_range_ratio_high",
    "kl_coef": "kl_coeff",
    "cliprange": "clip_range_ratio",
    "cliprange_value": "clip_range_value",
    "vf_coef": "value_coeff",
    "lam": "gae_lambda",
    "missing_eos_penalty": "no_end_penalty",
    "overlong_reward_buffer": "overlong_buffer",
    "overlong_penalty_factor": "overlong_penalty",
    "mask_truncated_completions": "filter_truncated",
}

# Names that mean our key only in jobs without a key of that very name: PaddleNLP's predictor calls the longest
# answer max_length, which in training is the longest row.
ALIASES_WHERE_FREE: dict[str, str] = {
    "max_length": "max_new_tokens",
    "adapter": "adapters",
    "quant_type": "scheme",
    "overwrite_output_dir": "overwrite",
    "num_return_sequences": "samples_per_prompt",
    "beta": "kl_loss_coeff",
}

# (key, other name of a value) -> our value. Only exact renames; what is another thing stays an error.
VALUE_NAMES: dict[tuple[str, str], str] = {
    ("device", "gpu"): "cuda",
    ("dtype", "float32"): "fp32",
    ("dtype", "float"): "fp32",
    ("dtype", "bfloat16"): "bf16",
    ("dtype", "float16"): "fp16",
    ("algorithm", "reinforce_plus_plus"): "reinforce++",
    ("algorithm", "reinforce_plus_plus_baseline"): "reinforce++_baseline",
    ("optim", "adamw_torch"): "adamw",
    ("optim", "adamw_torch_fused"): "adamw",
    ("optim", "adamw_bnb_8bit"): "adamw_8bit",
    ("optim", "paged_adamw_8bit"): "adamw_8bit",
    ("optim", "galore_adamw"): "galore",
    ("optim", "apollo_adamw"): "apollo",
    ("adapter_type", "lora_ga"): "loraga",
    ("adapter_type", "loreft"): "reft",
    ("adapter_type", "prefix"): "prefix_tuning",
    ("reft_intervention_type", "loreftintervention"): "loreft",
    ("reft_intervention_type", "tinyintervention"): "tiny",
    ("adapter_type", "lora_pro"): "lorapro",
    ("weight_quantize_algo", "4"): "nf4",
    ("weight_quantize_algo", "8"): "weight_only_int8",
    ("weight_quantize_algo", "int4"): "weight_only_int4",
    ("weight_quantize_algo", "int8"): "weight_only_int8",
    ("weight_quantize_algo", ""): "none",
    ("lr_scheduler_type", "warmup_stable_decay"): "wsd",
    ("rope_scaling_type", "rotaryembedding"): "none",
    ("rope_scaling_type", "linearscalingrotaryembedding"): "linear",
    ("rope_scaling_type", "ntkscalingrotaryembedding"): "ntk",
    ("rope_scaling_type", "dynamicntkscalingrotaryembedding"): "dynamic",
    ("rope_scaling_type", "yarnscalingrotaryembedding"): "yarn",
    ("decode_strategy", "greedy_search"): "greedy",
    # JSON and YAML have these as truth values.
    ("early_stopping", "true"): "true",
    ("early_stopping", "false"): "false",
    ("decode_strategy", "beam_search"): "greedy",
    ("weights", "weight_only_int8"): "int8",
    ("weights", "weight_only_int4"): "int4",
    ("weights", "a16w8"): "int8",
    ("weights", "a16w4"): "int4",
    ("weights", ""): "none",
    ("scheme", "a8w8"): "w8a8",
    ("scheme", "a8w8c8"): "w8a8c8",
    ("scheme", "a8w8_fp8"): "fp8",
    ("scheme", "weight_only_int8"): "w8a16",
    ("scheme", "weight_only_int4"): "w4a16",
    ("scheme", "wint8"): "w8a16",
    ("scheme", "wint4"): "w4a16",
    ("smooth", "true"): "smoothquant",
    ("smooth", "false"): "none",
    ("cache_dtype", "dynamic"): "int8",
    ("cache_dtype", "none"): "auto",
    ("cache_dtype", ""): "auto",
    ("speculative", "inference_with_reference"): "ngram",
    ("speculative", "prompt_lookup"): "ngram",
    ("metric_for_best_model", "eval_loss"): "loss",
    ("metric_for_best_model", "ppl"): "perplexity",
    ("metric_for_best_model", "eval_accuracy"): "accuracy",
    ("resume_from_checkpoint", "true"): "auto",
    ("resume_from_checkpoint", "false"): "none",
    ("report_to", "visualdl"): "tensorboard",
    ("report_to", "all"): "tensorboard,wandb,mlflow",
    ("report_to", "false"): "none",
    # YAML reads a bare no as false.
    ("evaluation_strategy", "false"): "no",
    ("save_strategy", "false"): "no",
}

# Renames a person should hear about, because what they get is not quite what they named.
VALUE_NOTES: dict[tuple[str, str], str] = {
    ("decode_strategy", "beam_search"): "decode_strategy beam_search: greedy, with as many beams as num_beams says",
    ("report_to", "visualdl"): "report_to visualdl: written for TensorBoard, which VisualDL's files resemble",
}


def canonical_key(name: str, keys: Iterable[str]) -> str:
    """Our name of a key among ``keys``; the name itself where there is none. Dashes count as underscores."""
    known = set(keys)
    plain = name.replace("-", "_")
    if plain in known:
        return plain
    for table in (ALIASES, ALIASES_WHERE_FREE):
        if table.get(plain) in known:
            return table[plain]
    return plain


def aliases_of(key: str, keys: Iterable[str]) -> list[str]:
    """The other names under which ``key`` can be given to a job with these ``keys``."""
    known = set(keys)
    other = [name for name, target in ALIASES.items() if target == key and name not in known]
    return other + [name for name, target in ALIASES_WHERE_FREE.items() if target == key and name not in known]


def canonical_value(key: str, value: object) -> tuple[object, str | None]:
    """Our spelling of a value and a note for the user, if the rename needs one."""
    if isinstance(value, list) and len(value) == 1 and key == "report_to":
        value = value[0]
    word = str(value).lower() if isinstance(value, (str, bool, int)) else None
    if word is None or (key, word) not in VALUE_NAMES:
        return value, None
    return VALUE_NAMES[key, word], VALUE_NOTES.get((key, word))


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that looks most like ``name``, or None if none does."""
    found = difflib.get_close_matches(name.replace("-", "_"), list(candidates), n=1, cutoff=0.6)
    return found[0] if found else None
