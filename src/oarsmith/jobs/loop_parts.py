"""From a configuration to the parts of the training loop, for every command that trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from oarsmith import processes
from oarsmith.config.train import TrainConfig
from oarsmith.jobs.adapter_training import update_hooks
from oarsmith.jobs.optimizers import make_optimizer
from oarsmith.jobs.spread import batches_per_step
from oarsmith.jobs.weights import Weights
from oarsmith.models.decoder import Decoder
from oarsmith.training.batches import BatchSource
from oarsmith.training.checkpoint import CheckpointStore
from oarsmith.training.ema import Ema
from oarsmith.training.forensics import Decode, Recorder
from oarsmith.training.log import ReadingLog, RunLog
from oarsmith.training.loop import Loop
from oarsmith.training.objective import Objective
from oarsmith.training.progress import Progress
from oarsmith.training.ranks import ALONE, Ranks
from oarsmith.training.run_state import LoopSettings
from oarsmith.training.saver import Saver
from oarsmith.training.scaler import LossScaler
from oarsmith.training.schedule import Schedule
from oarsmith.training.speed import SpeedMeter, matmul_rate
from oarsmith.training.spikes import SpikeDetector
from oarsmith.training.trackers import make_tracker
from oarsmith.training.update_hooks import UpdateHooks


def make_loop(
    config: TrainConfig,
    *,
    model: Decoder,
    objective: Objective,
    loader: BatchSource,
    store: CheckpointStore,
    progress: Progress,
    weights: Weights,
    evaluate: Callable[[], Mapping[str, float]] | None,
    decode: Decode,
    tokens_per_pass: int,
    ranks: Ranks = ALONE,
    hooks: UpdateHooks | None = None,
) -> Loop:
    """Wire the loop for this config. ``tokens_per_pass``: about how many go through the model at a time; ``hooks``:
    what the method does around the optimizer."""
    total = total_steps(config, loader)
    output_dir = store.output_dir
    optimizer = make_optimizer(config, model, ranks)
    recorder = Recorder(
        output_dir=output_dir, model=model, objective=objective, decode=decode, write_model=weights.write
    )
    return Loop(
        model=model,
        objective=objective,
        loader=loader,
        optimizer=optimizer,
        schedule=make_schedule(config, total),
        settings=loop_settings(config, total),
        output_dir=output_dir,
        saver=Saver(store=store, write_model=weights.write, background=config.use_async_save),
        log=RunLog(output_dir) if ranks.is_main else ReadingLog(output_dir),
        tracker=make_tracker(
            config.report_to if ranks.is_main else (),
            output_dir,
            run_name=config.run_name or output_dir.name,
            config=config.model_dump(mode="json"),
            board_dir=None if config.logging_dir is None else Path(config.logging_dir),
            say=progress.message,
        ),
        # Of all processes, as the tokens are.
        meter=SpeedMeter(model, matmul_rate(model, tokens_per_pass) * processes.count()),
        progress=progress,
        load_model=weights.load,
        evaluate=evaluate,
        recorder=recorder if ranks.alone else None,
        spikes=SpikeDetector(config.loss_spike_factor),
        ema=None if config.ema_decay is None else Ema(optimizer, decay=config.ema_decay),
        scaler=LossScaler(scale=config.scale_loss) if config.dtype == "fp16" else None,
        hooks=update_hooks(config, model, total) if hooks is None else hooks,
        ranks=ranks,
    )


def total_steps(config: TrainConfig, loader: BatchSource) -> int:
    """``max_steps``, or the updates of ``num_train_epochs``; an update never spans two epochs."""
    if config.max_steps > 0:
        return config.max_steps

    def updates(epoch: int) -> int:
        return math.ceil(loader.batches_per_epoch(epoch) / batches_per_step(config))

    whole = int(config.num_train_epochs)
    rest = math.ceil((config.num_train_epochs - whole) * updates(whole))
    return sum(updates(epoch) for epoch in range(whole)) + rest


def make_schedule(config: TrainConfig, total: int) -> Schedule:
    """The learning rate over ``total`` updates."""
    assert config.learning_rate is not None, "derived where not given"
    return Schedule(
        kind=config.lr_scheduler_type,
        peak=config.learning_rate,
        total_steps=total,
        warmup_steps=config.warmup_steps or math.ceil(config.warmup_ratio * total),
        floor=config.min_learning_rate,
        decay_steps=config.decay_steps,
        num_cycles=config.num_cycles,
        power=config.power,
        wsd_decay_steps=config.wsd_decay_steps,
        wsd_style=config.wsd_decay_style,
    )


def loop_settings(config: TrainConfig, total: int) -> LoopSettings:
    """When to log, evaluate and save in ``total`` updates."""
    assert config.evaluation_strategy is not None and config.eval_steps is not None, "derived where not given"
    return LoopSettings(
        seed=config.seed,
        total_steps=total,
        accumulate=batches_per_step(config),
        in_backward=config.optimizer_in_backward,
        max_grad_norm=config.max_grad_norm,
        log_steps=config.logging_steps,
        eval_when=config.evaluation_strategy,
        eval_steps=config.eval_steps,
        save_when=config.save_strategy,
        save_steps=config.save_steps,
        best_metric=f"eval_{config.metric_for_best_model}",
        greater_is_better=bool(config.greater_is_better),
        patience=config.early_stopping_patience,
        threshold=config.early_stopping_threshold,
        save_optimizer=not config.ignore_save_lr_and_optim,
        load_optimizer=not config.ignore_load_lr_and_optim,
        load_place=not config.ignore_data_skip,
    )
