"""``oarsmith sft``: fine-tune all weights, or LoRA adapters, on conversations."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from oarsmith import kernels
from oarsmith.adapters.lora import LoraSegment, attach, lora_scale
from oarsmith.adapters.peft_layout import load_adapter_weights, write_adapter
from oarsmith.adapters.targets import lora_rewrite, match_targets
from oarsmith.checkpoint.atomic import atomic_directory, atomic_write_text
from oarsmith.checkpoint.hf import fill, load_decoder, read_config, write_decoder
from oarsmith.checkpoint.source import TensorSource
from oarsmith.config.resolved import Resolved
from oarsmith.config.sft import SftConfig
from oarsmith.errors import ConfigError
from oarsmith.jobs.runtime import runtime
from oarsmith.loading import dtype_name, resolve
from oarsmith.methods import sft
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.text import Tokenizer, load_tokenizer
from oarsmith.text.choose import with_named_template
from oarsmith.training.checkpoint import CheckpointStore
from oarsmith.training.environment import describe_environment
from oarsmith.training.evaluate import Evaluation, evaluate
from oarsmith.training.log import RunLog
from oarsmith.training.loop import Loop, LoopSettings
from oarsmith.training.optimizer import AdamW, AdamWSettings
from oarsmith.training.precision import training_dtype
from oarsmith.training.progress import Progress
from oarsmith.training.report import write_report
from oarsmith.training.run_folder import RUN_FILE, open_run
from oarsmith.training.schedule import Schedule
from oarsmith.training.trackers import make_tracker


@dataclass(frozen=True)
class SftResult:
    """Where the trained model lies and how the run ended."""

    output_dir: Path
    model_dir: Path
    steps: int
    evaluation: Evaluation | None


def run(resolved: Resolved[SftConfig]) -> int:
    """The command."""
    console = Console(highlight=False)
    result = train(resolved, console)
    console.print(f"\nmodel:  {result.model_dir}")
    console.print(f"report: {result.output_dir / 'report.html'}")
    console.print(f"next:   oarsmith chat {result.output_dir}")
    if resolved.config.lora:
        console.print(f"        oarsmith merge-adapter {result.output_dir} MERGED   (a plain model, with proof)")
    return 0


def train(resolved: Resolved[SftConfig], console: Console) -> SftResult:
    """Data, model, loop, result: the whole procedure of a fine-tuning run."""
    with (
        runtime(resolved.config) as device,
        Progress(console, quiet=resolved.config.disable_tqdm) as progress,
    ):
        dtype = training_dtype(resolved.config.dtype, device)
        resolved = resolved.settle("auto on this machine", device=device.type, dtype=dtype_name(dtype))
        config = resolved.config
        output_dir = Path(config.output_dir)
        store = CheckpointStore(output_dir, keep=config.save_total_limit)
        checkpoint = open_run(
            output_dir,
            config.model_dump(),
            overwrite=config.overwrite_output_dir,
            resume=config.resume_from_checkpoint,
            store=store,
        )
        where = resolve(config.model_name_or_path)
        if where.adapter is not None:
            raise ConfigError(
                f"{config.model_name_or_path} is an adapter",
                where="model_name_or_path",
                fix=f"merge it first: oarsmith merge-adapter {config.model_name_or_path} MERGED",
            )
        tokenizer = make_tokenizer(config)
        spec = families.build_spec(read_config(where.base))[1]
        data = sft.build_data(config, tokenizer, spec.max_positions)
        for line in data.lines:
            console.print(line)
        model = load_trainable(config, where.base, dtype, device)
        _describe(model, dtype, console)
        resolved.save(output_dir / RUN_FILE)
        atomic_write_text(output_dir / "data_report.json", json.dumps(data.reports, indent=1) + "\n")
        atomic_write_text(output_dir / "environment.json", json.dumps(describe_environment(), indent=1) + "\n")
        loop = make_loop(config, model, data, tokenizer, where.base, store, progress)
        state = loop.run(checkpoint)
        if config.load_best_model_at_end and state.best_step is not None and state.best_step != state.step:
            loop.load_model(store.path(state.best_step))
            console.print(f"back to the best evaluation, step {state.best_step}")
        model_dir = output_dir / ("adapter" if config.lora else "model")
        with atomic_directory(model_dir) as folder:
            loop.write_model(folder)
        loop.tracker.close()
        final = loop.evaluate() if loop.evaluate is not None and config.do_eval else None
        write_report(output_dir)
    return SftResult(output_dir, model_dir, state.step, final)


def make_tokenizer(config: SftConfig) -> Tokenizer:
    """The tokenizer with the template the config names."""
    tokenizer = load_tokenizer(resolve(config.tokenizer_name_or_path or config.model_name_or_path).base)
    return with_named_template(tokenizer, config.chat_template)


def load_trainable(config: SftConfig, base: Path, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The model with the parameters that train marked so: all of them, or fresh adapters on a frozen base."""
    rewrite = None
    if config.lora:
        alpha = config.lora_alpha or 2.0 * config.lora_rank
        segment = LoraSegment(name="", rank=config.lora_rank, scale=lora_scale(alpha, config.lora_rank, config.rslora))
        targets = config.lora_target_modules
        rewrite = lora_rewrite(
            lambda modules: dict.fromkeys(match_targets(modules, targets), segment), config.lora_dropout
        )
    model = load_decoder(base, dtype=dtype, device=device, rewrite=rewrite)
    if config.lora:
        attach(model, config.seed)
    model.recompute = config.recompute
    if config.torch_compile:
        for block in model.layers:
            block.compile(dynamic=True)
    return model


def make_loop(
    config: SftConfig,
    model: Decoder,
    data: sft.SftData,
    tokenizer: Tokenizer,
    base: Path,
    store: CheckpointStore,
    progress: Progress,
) -> Loop:
    """Wire the loop for this config."""
    total = total_steps(config, data)
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total)
    output_dir = store.output_dir
    evaluator = None
    if data.evaluation is not None:
        batches = sft.epoch_batches(data.evaluation)

        def evaluator() -> Evaluation:
            return evaluate(model, sft.OBJECTIVE, batches())

    def write_model(folder: Path) -> None:
        if config.lora:
            write_adapter(model, folder, base=str(base.resolve()), settings=lora_settings(config))
        else:
            write_decoder(model, folder)
        tokenizer.save(folder)

    def load_model(folder: Path) -> None:
        if config.lora:
            load_adapter_weights(model, folder)
        else:
            with TensorSource(folder) as source:
                fill(model, families.find(model.config).names(model.spec), source)

    return Loop(
        model=model,
        objective=sft.OBJECTIVE,
        loader=data.train,
        optimizer=AdamW(
            ((name, p) for name, p in model.named_parameters() if p.requires_grad),
            AdamWSettings(
                beta1=config.adam_beta1,
                beta2=config.adam_beta2,
                eps=config.adam_epsilon,
                weight_decay=config.weight_decay,
            ),
        ),
        schedule=Schedule(
            kind=config.lr_scheduler_type,
            peak=config.learning_rate or 2e-5,
            total_steps=total,
            warmup_steps=warmup,
            floor=config.min_learning_rate,
        ),
        settings=loop_settings(config, total),
        output_dir=output_dir,
        store=store,
        log=RunLog(output_dir),
        tracker=make_tracker(config.report_to, Path(config.logging_dir or output_dir / "tensorboard")),
        progress=progress,
        write_model=write_model,
        load_model=load_model,
        evaluate=evaluator,
        decode=tokenizer.decode,
    )


def loop_settings(config: SftConfig, total: int) -> LoopSettings:
    """The loop's part of the config."""
    return LoopSettings(
        seed=config.seed,
        total_steps=total,
        accumulate=config.gradient_accumulation_steps,
        max_grad_norm=config.max_grad_norm,
        log_steps=config.logging_steps,
        eval_when=config.evaluation_strategy or "no",
        eval_steps=config.eval_steps or config.logging_steps,
        save_when=config.save_strategy,
        save_steps=config.save_steps,
        best_metric=f"eval_{config.metric_for_best_model}",
        greater_is_better=bool(config.greater_is_better),
    )


def lora_settings(config: SftConfig) -> dict[str, object]:
    """What ``adapter_config.json`` says of the run."""
    return {
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.rslora,
        "init_lora_weights": True,
    }


def total_steps(config: SftConfig, data: sft.SftData) -> int:
    """``max_steps``, or the updates of ``num_train_epochs``; an update never spans two epochs."""
    if config.max_steps > 0:
        return config.max_steps

    def updates(epoch: int) -> int:
        return math.ceil(data.train.batches_per_epoch(epoch) / config.gradient_accumulation_steps)

    whole = int(config.num_train_epochs)
    rest = math.ceil((config.num_train_epochs - whole) * updates(whole))
    return sum(updates(epoch) for epoch in range(whole)) + rest


def _describe(model: Decoder, dtype: torch.dtype, console: Console) -> None:
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = f", training {trained:,} of them ({trained / total:.2%})" if trained < total else ", training all"
    name = str(dtype).removeprefix("torch.")
    console.print(f"model: {total:,} parameters{share}; weights in {name}; {torch.get_num_threads()} threads")
    console.print(f"kernels: {kernels.describe()}")
