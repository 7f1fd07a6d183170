"""Groups of keys of every command that trains: optimizer, schedule, memory, long context, evaluation, checkpoints."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .base import Bool, Float, Int, Ints, JobConfig, Trackers

Optim = Literal["adamw", "adamw_8bit", "adamw_mini", "adafactor", "muon", "galore", "apollo", "apollo_mini"]


class OptimizerKeys(JobConfig):
    title: ClassVar[str] = "Optimizer"

    learning_rate: Float | None = Field(
        None,
        gt=0,
        description="Highest learning rate. Not given: 2e-5 for full fine-tuning, 2e-4 for LoRA, and in pretraining "
        "1e-3 from scratch, 5e-5 where weights are trained further.",
    )
    optim: Optim = Field(
        "adamw",
        description="Update rule. adamw: Adam with decoupled weight decay. adamw_8bit: its states in 8 bits. "
        "adamw_mini: one step size a block. adafactor: factored second moments. muon: orthogonalised momentum for the "
        "matrices of the blocks, AdamW for the rest. galore, apollo, apollo_mini: states in a low-rank subspace.",
    )
    weight_decay: Float = Field(
        0.0, ge=0, description="Weight decay per step times the learning rate. Biases and norms have none."
    )
    adam_beta1: Float = Field(0.9, ge=0, lt=1, description="AdamW: decay of the mean of the gradients.")
    adam_beta2: Float = Field(0.999, ge=0, lt=1, description="AdamW: decay of the mean of their squares.")
    adam_epsilon: Float = Field(1e-8, gt=0, description="AdamW: added to the denominator.")
    muon_momentum: Float = Field(0.95, ge=0, lt=1, description="Muon: momentum of the gradients it orthogonalises.")
    projection_rank: Int | None = Field(
        None,
        ge=1,
        description="GaLore, APOLLO: rank of the subspace that holds the states. Not given: 128; 1 for apollo_mini.",
    )
    projection_steps: Int = Field(200, ge=1, description="GaLore, APOLLO: steps between new subspaces.")
    projection_scale: Float | None = Field(
        None,
        gt=0,
        description="GaLore, APOLLO: factor on the update. Not given: 0.25 for galore, 1 for apollo and sqrt(128) for "
        "apollo_mini, as in the papers' code.",
    )
    max_grad_norm: Float = Field(
        1.0, ge=0, description="Gradients whose L2 norm over all weights is larger are scaled down to it; 0: never."
    )
    ema_decay: Float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Keep a moving average of the weights with this decay (0.999, say): evaluations use it and it is "
        "written beside the result as model-ema. Not given: none.",
    )
    scale_loss: Float = Field(
        32768.0, gt=0, description="fp16 only: factor on the loss at the start; it is adapted while training."
    )


class ScheduleKeys(JobConfig):
    title: ClassVar[str] = "Schedule"

    num_train_epochs: Float = Field(3.0, gt=0, description="Passes over the data. max_steps wins where it is given.")
    max_steps: Int = Field(-1, ge=-1, description="Optimizer steps in total; -1: as many as num_train_epochs needs.")
    lr_scheduler_type: Literal["linear", "cosine", "polynomial", "constant", "constant_with_warmup", "wsd"] = Field(
        "linear",
        description="How the learning rate falls after the warmup: along a line, a cosine or a polynomial to "
        "min_learning_rate, not at all, or (wsd) only in the last steps.",
    )
    warmup_steps: Int = Field(
        0, ge=0, description="Steps in which the learning rate grows from 0. Wins over warmup_ratio."
    )
    warmup_ratio: Float = Field(0.0, ge=0, lt=1, description="The warmup as a share of all steps (0.03 is 3 %).")
    min_learning_rate: Float = Field(0.0, ge=0, description="Learning rate at the end of a falling schedule.")
    decay_steps: Int | None = Field(
        None,
        ge=1,
        description="Step at which min_learning_rate is reached; it stays there afterwards. Not given: the last step.",
    )
    num_cycles: Float = Field(0.5, gt=0, description="cosine: waves until decay_steps; 0.5 is one fall.")
    power: Float = Field(1.0, gt=0, description="polynomial: the exponent; 1 is a line.")
    wsd_decay_steps: Int | None = Field(
        None, ge=1, description="wsd: length of the fall at the end, in steps. Not given: a tenth of all steps."
    )
    wsd_decay_style: Literal["linear", "cosine", "minus_sqrt", "exponential"] = Field(
        "minus_sqrt", description="wsd: the shape of the fall (Megatron-core's names)."
    )


class LossKeys(JobConfig):
    title: ClassVar[str] = "Loss"

    z_loss: Float = Field(
        0.0, ge=0, description="Weight of the z term log(Z)^2, which keeps logits small (1e-4 in PaLM); 0: none."
    )
    neftune: Bool = Field(False, description="Add noise to the embeddings in training (NEFTune).")
    neftune_noise_alpha: Float = Field(
        5.0, gt=0, description="NEFTune: size of the noise, alpha / sqrt(length x width)."
    )


class MemoryKeys(JobConfig):
    title: ClassVar[str] = "Speed and memory"

    recompute: Bool = Field(
        False,
        description="Activation checkpointing: keep fewer activations and compute them again in the backward pass. "
        "Slower, less memory, the same numbers.",
    )
    recompute_granularity: Literal["full", "full_attn", "core_attn"] = Field(
        "full",
        description="What is computed again: whole blocks (a third slower), the attention part, or only its core.",
    )
    no_recompute_layers: Ints = Field(
        (), description="Blocks that keep their activations all the same, counted from 0."
    )
    torch_compile: Bool = Field(
        False,
        description="Compile the model with torch.compile: a slow start, then faster steps; compiled code is kept.",
    )
    offload_optim: Bool = Field(
        False, description="Keep the optimizer's state in the computer's memory and update there. For GPUs."
    )
    optimizer_in_backward: Bool = Field(
        False,
        description="Update each weight as soon as its gradient is known and free the gradient: less memory. One pass "
        "a step, no clipping.",
    )


class LongContextKeys(JobConfig):
    title: ClassVar[str] = "Long context"

    rope_scaling_type: Literal["none", "linear", "ntk", "dynamic", "yarn"] = Field(
        "none",
        description="Stretch the model's rotary positions to rope_scaling_factor times its context; the saved model "
        "carries it.",
    )
    rope_scaling_factor: Float = Field(1.0, ge=1, description="How many times longer the context becomes.")
    use_pose_convert: Bool = Field(
        False,
        description="PoSE: train on rows of max_length tokens whose positions skip, so that they cover the whole "
        "stretched context.",
    )
    use_ssa: Bool = Field(
        False, description="LongLoRA's shifted sparse attention in training: half of the heads see shifted groups."
    )
    ssa_group_size_ratio: Float = Field(
        0.25, gt=0, le=1, description="Shifted sparse attention: a group's share of the document."
    )


class EvaluationKeys(JobConfig):
    title: ClassVar[str] = "Evaluation"

    evaluation_strategy: Literal["no", "steps", "epoch"] | None = Field(
        None,
        description="When to evaluate. Not given: where eval data is named, every epoch (in pretraining every "
        "eval_steps).",
    )
    eval_steps: Int | None = Field(None, ge=1, description="Steps between evaluations. Not given: logging_steps.")
    max_evaluate_steps: Int = Field(
        -1, ge=-1, description="Batches of one evaluation; -1: all (in pretraining 10, for the test split 100)."
    )
    per_device_eval_batch_size: Int = Field(8, ge=1, description="Rows in one pass of an evaluation.")
    load_best_model_at_end: Bool = Field(
        False, description="End with the weights of the best evaluation. Evaluations and checkpoints must coincide."
    )
    metric_for_best_model: Literal["loss", "perplexity", "accuracy", "bleu4", "rouge1", "rouge2", "rougel"] = Field(
        "loss",
        description="Which evaluation number says what is best. accuracy: share of trained tokens predicted. bleu4 and "
        "rouge need eval_with_do_generation.",
    )
    greater_is_better: Bool | None = Field(
        None, description="Whether a larger number is better. Not given: false for loss and perplexity, else true."
    )
    early_stopping_patience: Int = Field(
        0, ge=0, description="Stop after this many evaluations in a row without a better one; 0: never."
    )
    early_stopping_threshold: Float = Field(
        0.0, ge=0, description="How much better an evaluation must be to count, in units of metric_for_best_model."
    )


class CheckpointKeys(JobConfig):
    title: ClassVar[str] = "Checkpoints"

    save_strategy: Literal["no", "steps", "epoch"] = Field(
        "steps", description="When to write a checkpoint that can be resumed. The final model is written in any case."
    )
    save_steps: Int = Field(500, ge=1, description="Steps between checkpoints.")
    save_total_limit: Int | None = Field(
        None, ge=1, description="Keep this many checkpoints, the newest ones and the best one. Not given: all."
    )
    use_async_save: Bool = Field(
        False,
        description="Write checkpoints in the background while training goes on, from a copy of the weights in memory.",
    )
    ignore_save_lr_and_optim: Bool = Field(
        False, description="Checkpoints without the optimizer's state: smaller, but a run cannot be resumed exactly."
    )
    ignore_load_lr_and_optim: Bool = Field(
        False, description="Resume with fresh optimizer states (the step count and the data's place are kept)."
    )
    ignore_data_skip: Bool = Field(False, description="Resume at the beginning of the data.")


class LogKeys(JobConfig):
    title: ClassVar[str] = "Logs"

    logging_steps: Int = Field(10, ge=1, description="Steps between lines of the log.")
    report_to: Trackers = Field(
        (),
        description="Further places for the numbers: tensorboard, wandb (offline unless you are logged in), mlflow; "
        "several separated by commas. Not given: none.",
    )
    logging_dir: str | None = Field(None, description="TensorBoard's folder. Not given: output_dir/tensorboard.")
    run_name: str | None = Field(None, description="The run's name in trackers. Not given: the name of output_dir.")
    disable_tqdm: Bool = Field(False, description="No progress bar; log lines are still printed.")
    loss_spike_factor: Float = Field(
        3.0,
        ge=0,
        description="Keep batch, weights and statistics of a step whose loss is more than this many times the median "
        "of the steps before it (at most three such folders; see oarsmith replay); 0: never.",
    )
