"""``oarsmith sft``: fine-tune all weights, or LoRA adapters, on conversations."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from oarsmith import kernels
from oarsmith.adapters.lora import LoraSegment, attach, lora_scale
from oarsmith.adapters.peft_layout import load_adapter_weights, write_adapter
from oarsmith.adapters.targets import lora_rewrite, match_targets
from oarsmith.atomic import atomic_directory, atomic_write_text
from oarsmith.checkpoint.config_file import read_config
from oarsmith.checkpoint.fill import fill
from oarsmith.checkpoint.hf import DTYPES, load_decoder, write_decoder
from oarsmith.checkpoint.source import open_source
from oarsmith.config.resolved import RUN_FILE, Resolved
from oarsmith.config.sft import SftConfig
from oarsmith.errors import ConfigError, DataError
from oarsmith.jobs.loop_parts import loop_settings, make_optimizer, make_schedule
from oarsmith.jobs.runtime import fit_max_length, make_console, make_tokenizer, runtime
from oarsmith.loading import dtype_name, resolve
from oarsmith.methods import sft
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.text import Tokenizer
from oarsmith.training.checkpoint import CheckpointStore
from oarsmith.training.environment import describe_environment
from oarsmith.training.evaluate import Evaluation, evaluate
from oarsmith.training.log import RunLog
from oarsmith.training.loop import Loop
from oarsmith.training.precision import has_fast_bf16, training_dtype
from oarsmith.training.progress import Progress
from oarsmith.training.report import write_report
from oarsmith.training.run_folder import discard_run, open_run
from oarsmith.training.trackers import make_tracker


@dataclass(frozen=True)
class SftResult:
    """Where the trained model lies, which step it is of, and its evaluation record."""

    output_dir: Path
    model_dir: Path
    steps: int
    evaluation: Mapping[str, float] | None


def run(resolved: Resolved[SftConfig]) -> int:
    """The command."""
    console = make_console()
    result = train(resolved, console) if resolved.config.do_train else evaluate_only(resolved, console)
    if result.evaluation is not None:
        loss, perplexity = result.evaluation["eval_loss"], result.evaluation["eval_perplexity"]
        accuracy = result.evaluation["eval_accuracy"]
        console.print(f"\neval:   loss {loss:.4f}, perplexity {perplexity:.2f}, token accuracy {accuracy:.1%}")
    if not resolved.config.do_train:
        return 0
    console.print(f"model:  {result.model_dir}")
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
        base = plain_model(resolved.config)
        resolved = settle(resolved, base, device)
        config, output_dir = resolved.config, Path(resolved.config.output_dir)
        store = CheckpointStore(output_dir, keep=config.save_total_limit)
        checkpoint = open_run(
            output_dir,
            config.model_dump(),
            overwrite=config.overwrite_output_dir,
            resume=config.resume_from_checkpoint,
            store=store,
            inputs=[Path(name) for name in (base, config.dataset_name_or_path, config.eval_dataset_path) if name],
        )
        tokenizer = make_tokenizer(config)
        data = sft.build_data(config, tokenizer)
        for line in data.lines:
            console.print(line)
        require_vocabulary(data, base)
        model = load_trainable(config, base, device)
        _describe(model, console)
        if config.overwrite_output_dir:
            discard_run(output_dir)
        resolved.save(output_dir / RUN_FILE)
        atomic_write_text(output_dir / "data_report.json", json.dumps(data.reports, indent=1) + "\n")
        atomic_write_text(output_dir / "environment.json", json.dumps(describe_environment(), indent=1) + "\n")
        loop = make_loop(config, model, data, tokenizer, base, store, progress)
        console.print(_plan(config, loop.settings.total_steps))
        with closing(loop.tracker):
            state = loop.run(checkpoint)
            step = state.step
            if config.load_best_model_at_end and state.best_step not in (None, step):
                step = state.best_step
                loop.load_model(store.path(step))
                console.print(f"back to the best checkpoint, step {step}")
            model_dir = output_dir / ("adapter" if config.lora else "model")
            with atomic_directory(model_dir) as folder:
                loop.write_model(folder)
            evaluation = _final_evaluation(loop, step) if config.do_eval else None
        write_report(output_dir)
    return SftResult(output_dir, model_dir, step, evaluation)


def evaluate_only(resolved: Resolved[SftConfig], console: Console) -> SftResult:
    """Score the model as it is on the evaluation rows; writes nothing."""
    with runtime(resolved.config) as device:
        base = plain_model(resolved.config)
        config = settle(resolved, base, device).config
        data = sft.build_data(config, make_tokenizer(config))
        for line in data.lines:
            console.print(line)
        require_vocabulary(data, base)
        if data.evaluation is None:
            raise ConfigError("there is nothing to evaluate on", where="do_train false", fix="give eval_dataset_path")
        model = load_decoder(base, dtype=DTYPES[config.dtype], device=device)
        record = evaluate(model, sft.OBJECTIVE, sft.epoch_batches(data.evaluation)()).record()
    return SftResult(Path(config.output_dir), base, 0, record)


def plain_model(config: SftConfig) -> Path:
    """The directory of the model to train.

    Raises:
        ConfigError: it is an adapter.
    """
    where = resolve(config.model_name_or_path)
    if where.adapter is not None:
        raise ConfigError(
            f"{config.model_name_or_path} is an adapter",
            where="model_name_or_path",
            fix=f"merge it first: oarsmith merge-adapter {config.model_name_or_path} MERGED",
        )
    return where.base


def settle(resolved: Resolved[SftConfig], base: Path, device: torch.device) -> Resolved[SftConfig]:
    """The values that this machine and this model decide."""
    dtype = training_dtype(resolved.config.dtype, fast_bf16=has_fast_bf16(device))
    resolved = resolved.settle("auto on this machine", device=device.type, dtype=dtype_name(dtype))
    return fit_max_length(resolved, families.build_spec(read_config(base))[1].max_positions)


def require_vocabulary(data: sft.SftData, base: Path) -> None:
    """Refuse token ids the model has no row for: the tokenizer is another model's."""
    size, (highest, where) = families.build_spec(read_config(base))[1].vocab_size, data.highest_id
    if highest >= size:
        raise DataError(
            f"token id {highest} is outside the model's vocabulary of {size}",
            where=where,
            fix="use the tokenizer that belongs to this model",
        )


def load_trainable(config: SftConfig, base: Path, device: torch.device) -> Decoder:
    """The model with the parameters that train marked so: all of them, or fresh adapters on a frozen base."""
    rewrite = None
    if config.lora:
        alpha = config.lora_alpha or 2.0 * config.lora_rank
        segment = LoraSegment(name="", rank=config.lora_rank, scale=lora_scale(alpha, config.lora_rank, config.rslora))
        targets = config.lora_target_modules
        rewrite = lora_rewrite(
            lambda modules: dict.fromkeys(match_targets(modules, targets), segment), config.lora_dropout
        )
    model = load_decoder(base, dtype=DTYPES[config.dtype], device=device, rewrite=rewrite)
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
            with open_source(folder) as source:
                fill(model, families.find(model.config).names(model.spec), source)

    return Loop(
        model=model,
        objective=sft.OBJECTIVE,
        loader=data.train,
        optimizer=make_optimizer(config, model),
        schedule=make_schedule(config, total),
        settings=loop_settings(config, total),
        output_dir=output_dir,
        store=store,
        log=RunLog(output_dir),
        tracker=make_tracker(config.report_to[0] if config.report_to else "none", Path(config.logging_dir or output_dir / "tensorboard")),
        progress=progress,
        write_model=write_model,
        load_model=load_model,
        evaluate=evaluator,
        decode=tokenizer.decode,
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


def _final_evaluation(loop: Loop, step: int) -> Mapping[str, float] | None:
    """The evaluation of the weights of ``step``: the one in the log, or made now and logged."""
    known = [record for record in loop.log.records() if record["step"] == step and "eval_loss" in record]
    if known or loop.evaluate is None:
        return known[-1] if known else None
    record = {"step": step, **loop.evaluate().record()}
    loop.log.append(record)
    loop.tracker.log(record)
    return record


def _plan(config: SftConfig, total: int) -> str:
    length = f"{config.max_length:,} tokens, packed" if config.zero_padding else "one sample each"
    passes = config.gradient_accumulation_steps
    count = (config.per_device_train_batch_size or 1) * passes
    rows = f"{count} {'row' if count == 1 else 'rows'} ({length})"
    split = f" in {passes} passes" if passes > 1 else ""
    epochs = f" ({config.num_train_epochs:g} epochs)" if config.max_steps <= 0 else ""
    rate = f"learning rate {config.learning_rate:g}, {config.lr_scheduler_type}"
    return f"training: {total:,} steps{epochs} of {rows}{split}; {rate}; into {config.output_dir}"


def _describe(model: Decoder, console: Console) -> None:
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = f", training {trained:,} of them ({trained / total:.2%})" if trained < total else ", training all"
    name = str(model.embedding.weight.dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    workers = "1 thread" if threads == 1 else f"{threads} threads"
    console.print(f"model: {total:,} parameters{share}; weights in {name}; {workers}")
    console.print(f"kernels: {kernels.describe()}")
