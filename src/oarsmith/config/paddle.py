"""PaddleNLP keys that Oarsmith does not have: those without a meaning here, those not built yet, those of other jobs.

The first are listed once and ignored, because ignoring them changes no number. The second are accepted at the value
that asks for nothing and refused at any other: a request that cannot be honoured stops.
"""

from __future__ import annotations

from dataclasses import dataclass

_KERNEL = "a Paddle kernel switch; the fast exact operation is always used here (see the key kernels)"
_FUSED_WEIGHTS = "a weight layout of Paddle; weights keep their Hugging Face layout here, in any case"
_CHECKPOINT = "a Paddle checkpoint format; checkpoints are always Hugging Face directories here"
_LOADER = "rows are read and tokenized once, before training; there are no loader processes to set up"
_CHUNKED = "the head and the loss always run in chunks, on trained tokens only"
_DROPOUT = "the models here have no dropout inside their blocks, as most families were trained"
_WORDS = "whole words matter to masked models only; decoders take the text as it is"
_TUNING = "tunes how Paddle overlaps communication; torch's own parts do that here"
_LAYOUT = "how Paddle splits the work over devices; one process computes the same numbers without"
_AMP = "a detail of Paddle's mixed precision; here weights and optimizer are kept exactly as the docs of dtype say"

_ENGINE = "rollouts always come from the engine that serves; see the key rollout_compute"
_PASSES = "passes without gradient take as many answers as fit; see per_device_train_batch_size for those with one"

WITHOUT_EFFECT: dict[str, str] = {
    "use_flash_attention": _KERNEL,
    "use_fused_rms_norm": _KERNEL,
    "use_fused_rope": _KERNEL,
    "use_fused_linear": _KERNEL,
    "use_fused_dropout_add": _KERNEL,
    "use_fast_layer_norm": _KERNEL,
    "use_fused_linear_cross_entropy": _CHUNKED,
    "use_fused_head_and_loss_fn": _CHUNKED,
    "use_sparse_head_and_loss_fn": _CHUNKED,
    "enable_linear_fused_grad_add": _KERNEL,
    "use_quick_lora": "a Paddle kernel switch; LoRA's backward pass is always the cheap one here",
    "flash_mask": "packed samples are always isolated from each other here, with any kernel",
    "fuse_attention_qkv": _FUSED_WEIGHTS,
    "fuse_attention_ffn": _FUSED_WEIGHTS,
    "unified_checkpoint": _CHECKPOINT,
    "unified_checkpoint_config": _CHECKPOINT,
    "save_sharded_model": _CHECKPOINT,
    "load_sharded_model": _CHECKPOINT,
    "save_on_each_node": _CHECKPOINT,
    "ordered_save_group_size": _CHECKPOINT,
    "lazy": _LOADER,
    "lazy_data_processing": _LOADER,
    "dataloader_num_workers": _LOADER,
    "dataloader_drop_last": "the last batch is never dropped; the loss counts its tokens",
    "distributed_dataloader": _LOADER,
    "remove_unused_columns": _LOADER,
    "label_names": _LOADER,
    "pad_to_multiple_of": "batches are never padded",
    "pad_to_max_length": "batches are never padded",
    "eval_accumulation_steps": "evaluation adds up sums, never logits; there is nothing to accumulate",
    "prediction_loss_only": "evaluation always gives loss, perplexity and accuracy",
    "fp16_opt_level": _AMP,
    "amp_master_grad": _AMP,
    "amp_custom_black_list": _AMP,
    "amp_custom_white_list": _AMP,
    "bf16_full_eval": _AMP,
    "fp16_full_eval": _AMP,
    "tensor_parallel_output": _TUNING,
    "tensor_parallel_config": _TUNING,
    "pipeline_parallel_config": _TUNING,
    "sharding_parallel_config": _TUNING,
    "data_parallel_config": _TUNING,
    "sequence_parallel_config": _TUNING,
    "fuse_sequence_parallel_allreduce": _TUNING,
    "hybrid_parallel_topo_order": _TUNING,
    "ddp_find_unused_parameters": _TUNING,
    "local_rank": _TUNING,
    "virtual_pp_degree": _LAYOUT,
    "sequence_parallel": _LAYOUT,
    "use_expert_parallel": _LAYOUT,
    "enable_auto_parallel": _LAYOUT,
    "release_grads": "gradients are always freed after an update; see the key optimizer_in_backward",
    "refined_recompute": "which single operations Paddle computes again; see recompute_granularity and "
    "no_recompute_layers",
    "data_format": "the format of a corpus is recognised by its files",
    "chinese": _WORDS,
    "cn_whole_word_segment": _WORDS,
    "cn_seg_func": _WORDS,
    "cn_splited": _WORDS,
    "cn_split_dimer": _WORDS,
    "skip_warmup": "corpora are mapped, and never read through before training",
    "hidden_dropout_prob": _DROPOUT,
    "attention_probs_dropout_prob": _DROPOUT,
    "disable_dropout": _DROPOUT,
    "strategy_type": "strategy_name says it; see the key rope_scaling_type",
    "to_static": "Paddle's graph compiler; see the key torch_compile",
    "skip_profile_timer": "the log always shows where the time goes",
    "skip_memory_metrics": "the log always shows memory",
    "logging_strategy": "the log is written every logging_steps",
    "logging_first_step": "the first step is always logged",
    "task_name": "the dataset's own name says it",
    "block_attn": _KERNEL,
    "append_attn": _KERNEL,
    "inference_model": _KERNEL,
    "model_prefix": "a name inside Paddle's static graph files",
    "normalizer_type": "only with normalize_score_during_training; see regularization for scores around 0",
    "momentum": "only with normalize_score_during_training; see regularization for scores around 0",
    "do_ptq": "quantizing always does; see the key algorithm",
    "use_fusemt": _ENGINE,
    "eval_mode": _ENGINE,
    "use_fp32_compute": "log-probabilities are computed from fp32 logits in any case",
    "balance_batch": "batches are never padded, so nothing is to be balanced",
    "use_remove_padding": "batches are never padded",
    "offload_level": "models that are frozen stay where they are; see the key offload_optim",
    "per_device_logprob_batch_size": _PASSES,
    "per_device_reward_batch_size": _PASSES,
    "per_device_value_batch_size": _PASSES,
    "rl_algorithm": "the command says it: oarsmith ppo, or grpo with its key algorithm",
    "tensor_type": "tensors are always PyTorch's",
    "merge_prefix": "the files of weights are found by what they are, not by a prefix",
    "split_pieces": "large tensors are always computed with in blocks",
    "max_tensor_mem": "large tensors are always computed with in blocks",
    "wandb_api_key": "Weights & Biases reads its key from the environment or 'wandb login'; see report_to",
}


@dataclass(frozen=True)
class NotBuilt:
    """A feature that this version lacks.

    Args:
        neutral: spellings (lower case) of the value that does not ask for it.
        what: the feature, to end the sentence "... is not built yet in this version".
        fix: an instruction.
    """

    neutral: frozenset[str]
    what: str
    fix: str


_ONE = frozenset({"1", "-1", "0", "", "none"})
_OFF = frozenset({"false", "0", "no", "off", "", "none"})


def _switch(what: str, fix: str | None = None) -> NotBuilt:
    return NotBuilt(_OFF, what, fix or "set it to false")


NOT_BUILT: dict[str, NotBuilt] = {
    "data_impl": NotBuilt(
        frozenset({"mmap", "", "none"}),
        "writing another layout than mmap",
        "set it to mmap; old corpora are read",
    ),
    "lora_path": NotBuilt(_OFF, "training an adapter further", "merge it first with oarsmith merge-adapter"),
    "prefix_path": NotBuilt(_OFF, "training an adapter further", "begin with a new one"),
    "reft_path": NotBuilt(_OFF, "training an adapter further", "begin with a new one"),
    "autoregressive": _switch("that switch", "set dataset_format text and train_on all instead"),
    "do_export": _switch("exporting after training"),
    "do_ceval": _switch("C-Eval during training"),
    "benchmark": _switch("a benchmark mode", "set it to false; 'oarsmith bench' measures"),
    "autotuner_benchmark": _switch("a benchmark mode"),
    "ckpt_quant_stage": NotBuilt(frozenset({"o0", "none", ""}), "quantized optimizer states", "set it to O0"),
    "normalize_score_during_training": _switch("scores divided by their running deviation"),
    "global_gen_batch_size": NotBuilt(_ONE, "another number of prompts for rollouts than for updates", "set it to -1"),
    "rollout_quant_type": NotBuilt(_OFF, "rollouts with quantized weights", 'set it to ""'),
    "quant_type": NotBuilt(_OFF, "quantized inference", 'set it to ""'),
}


def refusal(key: str, value: object) -> NotBuilt | None:
    """Why this value of a key in ``NOT_BUILT`` cannot be honoured, or None where it asks for nothing."""
    entry = NOT_BUILT[key]
    return None if value is None or str(value).strip().lower() in entry.neutral else entry
