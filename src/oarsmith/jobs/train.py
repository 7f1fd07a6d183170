"""The procedure of a training run, whatever the method: data, model, loop, result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from rich.console import Console

from oarsmith import kernels
from oarsmith.atomic import atomic_directory, atomic_write_text
from oarsmith.config.idle import idle_keys
from oarsmith.config.resolved import RUN_FILE, Resolved
from oarsmith.config.train import TrainConfig
from oarsmith.errors import ConfigError
from oarsmith.jobs.adapter_training import prepare
from oarsmith.jobs.loop_parts import make_loop, total_steps
from oarsmith.jobs.runtime import runtime
from oarsmith.jobs.spread import batches_per_step, split, spread
from oarsmith.jobs.start import Start, require_vocabulary, with_skipped_positions
from oarsmith.jobs.weights import Weights
from oarsmith.methods.data import TrainingData
from oarsmith.models.decoder import Decoder
from oarsmith.parallel.mesh import Mesh
from oarsmith.text import Tokenizer
from oarsmith.training.batches import BatchSet
from oarsmith.training.checkpoint import CheckpointStore
from oarsmith.training.environment import describe_environment
from oarsmith.training.evaluate import evaluate, in_words
from oarsmith.training.loop import Loop
from oarsmith.training.objective import Objective
from oarsmith.training.progress import Progress
from oarsmith.training.ranks import ALONE, Ranks
from oarsmith.training.report import write_report
from oarsmith.training.run_folder import discard_run, open_run
from oarsmith.training.update_hooks import UpdateHooks

C = TypeVar("C", bound=TrainConfig)
Evaluate = Callable[[], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Recipe(Generic[C]):
    """What a method brings to the procedure.

    Attributes:
        start: settles what machine and model decide, and says what the run starts from.
        inputs: paths the run reads, which an overwritten run folder must not hold.
        build_data: reads the data.
        load_model: the model, with the parameters that train marked so.
        weights: how its trained weights become files.
        plan: the rows of a step, in words; ``tokens_per_pass``: about how many tokens one pass has.
        complete: the data with what only the loaded model can say of it, before it trains.
        extra_scores: further numbers of an evaluation, beside loss, perplexity and accuracy.
        attach: the objective with what only the completed data has; ``hooks``: what else is updated beside the model.
    """

    objective: Callable[[C], Objective]
    start: Callable[[Resolved[C], torch.device], tuple[Resolved[C], Start]]
    tokenizer: Callable[[C], Tokenizer]
    inputs: Callable[[C], list[str | None]]
    build_data: Callable[[C, Start, Tokenizer], TrainingData]
    load_model: Callable[[C, Start, torch.device], Decoder]
    weights: Callable[[C, Start, Tokenizer], Weights]
    plan: Callable[[C], str]
    tokens_per_pass: Callable[[C], int]
    complete: Callable[[C, Start, Decoder, TrainingData, Console], TrainingData] = lambda *given: given[3]
    extra_scores: Callable[[C, Decoder, Tokenizer, TrainingData], Evaluate | None] = lambda *_: None
    attach: Callable[[Objective, TrainingData], Objective] = lambda objective, _: objective
    hooks: Callable[[C, TrainingData], UpdateHooks | None] = lambda *_: None


@dataclass(frozen=True)
class TrainResult:
    """Where the trained model lies, which step it is of, and its records on the evaluation and test data."""

    output_dir: Path
    model_dir: Path
    steps: int
    evaluation: Mapping[str, float] | None
    test: Mapping[str, float] | None = None


def run(resolved: Resolved[C], recipe: Recipe[C], console: Console) -> TrainResult:
    """Train, or only evaluate, and print what came out."""
    result = train(resolved, recipe, console) if resolved.config.do_train else evaluate_only(resolved, recipe, console)
    for name, record in (("eval:", result.evaluation), ("test:", result.test)):
        if record is not None:
            console.print(f"{name:<7} {', '.join(in_words(record))}")
    if resolved.config.do_train:
        console.print(f"model:  {result.model_dir}")
        console.print(f"report: {result.output_dir / 'report.html'}")
    return result


def train(resolved: Resolved[C], recipe: Recipe[C], console: Console) -> TrainResult:
    """The whole procedure of a run."""
    with (
        runtime(resolved.config) as device,
        spread(resolved.config, device) as mesh,
        Progress(console, quiet=resolved.config.disable_tqdm or not mesh.is_main) as progress,
    ):
        resolved, start = recipe.start(resolved, device)
        config, output_dir = resolved.config, Path(resolved.config.output_dir)
        for key, why in idle_keys(config, resolved.provenance).items():
            if key not in resolved.without_effect:  # only this machine could tell
                console.print(f"note: {key} has no effect: {why}")
        store = CheckpointStore(output_dir, keep=config.save_total_limit)
        with mesh.main_first():
            checkpoint = open_run(
                output_dir,
                config.model_dump(),
                overwrite=config.overwrite_output_dir,
                resume=config.resume_from_checkpoint,
                store=store,
                inputs=[start.base, *(Path(name) for name in recipe.inputs(config) if name)],
            )
        tokenizer = recipe.tokenizer(config)
        with mesh.main_first():
            data = recipe.build_data(config, start, tokenizer)
        for line in data.lines:
            console.print(line)
        require_vocabulary(data.highest_id, start)
        model = recipe.load_model(config, start, device)
        console.print(_describe(model, fresh=start.fresh))
        console.print(f"kernels: {kernels.describe()}")
        _begin_folder(resolved, output_dir, data, model, mesh)
        weights = recipe.weights(config, start, tokenizer)
        objective = recipe.objective(config)
        data = recipe.complete(config, start, model, data, console)
        objective = recipe.attach(objective, data)
        extra = recipe.extra_scores(config, model, tokenizer, data)
        loader = with_skipped_positions(config, start, data.train)
        if checkpoint is None:
            prepare(config, model, objective, loader, console)
        ranks = split(config, model, mesh, console)
        loop = make_loop(
            config,
            model=model,
            objective=objective,
            loader=loader,
            store=store,
            progress=progress,
            weights=weights,
            evaluate=evaluation_of(model, objective, data.evaluation, extra, ranks),
            decode=tokenizer.decode,
            tokens_per_pass=recipe.tokens_per_pass(config),
            hooks=recipe.hooks(config, data),
            ranks=ranks,
        )
        console.print(_plan(config, recipe, loop.settings.total_steps))
        with closing(loop.tracker):
            result = _finish(config, loop, weights, checkpoint, data, console)
        mesh.once(lambda: write_report(output_dir))
    return result


def _finish(
    config: TrainConfig, loop: Loop, weights: Weights, checkpoint: Path | None, data: TrainingData, console: Console
) -> TrainResult:
    """Run the loop, choose the step that counts, write the result, score it."""
    state = loop.run(checkpoint)
    step = state.step
    if config.load_best_model_at_end and state.best_step is not None and state.best_step != step:
        step = state.best_step
        loop.return_to(step)
        console.print(f"back to the best checkpoint, step {step}")
    folder = loop.output_dir / weights.name
    _write_whole(loop, weights, folder)
    if loop.ema is not None:
        with loop.ema.applied():
            _write_whole(loop, weights, loop.output_dir / f"{weights.name}-ema")
        console.print(f"averaged weights: {loop.output_dir / f'{weights.name}-ema'}")
    evaluation = _final_evaluation(loop, step) if config.do_eval else None
    test = None
    if config.do_predict and data.test is not None:
        test = {"step": step, **evaluate(loop.model, loop.objective, data.test(), ranks=loop.ranks).record()}
        if loop.ranks.is_main:
            atomic_write_text(loop.output_dir / "test.json", json.dumps(test, indent=1) + "\n")
    return TrainResult(loop.output_dir, folder, step, evaluation, test)


def _write_whole(loop: Loop, weights: Weights, folder: Path) -> None:
    """The trained weights of all processes as files, there at once; all processes must ask."""
    model = loop.ranks.whole_model(loop.model)
    if model is not None:
        with atomic_directory(folder) as target:
            weights.write(model, target)
    loop.ranks.barrier()


def evaluate_only(resolved: Resolved[C], recipe: Recipe[C], console: Console) -> TrainResult:
    """Score the model as it is on the evaluation data; writes nothing."""
    with runtime(resolved.config) as device, spread(resolved.config, device) as mesh:
        resolved, start = recipe.start(resolved, device)
        config, tokenizer = resolved.config, recipe.tokenizer(resolved.config)
        data = recipe.build_data(config, start, tokenizer)
        for line in data.lines:
            console.print(line)
        require_vocabulary(data.highest_id, start)
        if data.evaluation is None and not data.answers_evaluated:
            raise ConfigError("there is nothing to evaluate on", where="do_train false", fix="give eval_dataset_path")
        model = recipe.load_model(config, start, device)
        data = recipe.complete(config, start, model, data, console)
        extra = recipe.extra_scores(config, model, tokenizer, data)
        scores = evaluation_of(
            model, recipe.objective(config), data.evaluation, extra, split(config, model, mesh, console)
        )
        assert scores is not None
        return TrainResult(Path(config.output_dir), start.base, 0, scores())


def evaluation_of(
    model: Decoder, objective: Objective, batches: BatchSet | None, extra: Evaluate | None, ranks: Ranks = ALONE
) -> Evaluate | None:
    """Everything an evaluation measures, as one record; None without data for it. ``extra`` alone is one where it looks
    at answers."""
    if batches is None:
        return extra

    def score() -> Mapping[str, float]:
        record = evaluate(model, objective, batches(), ranks=ranks).record()
        return record if extra is None else {**record, **extra()}

    return score


def _begin_folder(resolved: Resolved[C], output_dir: Path, data: TrainingData, model: Decoder, mesh: Mesh) -> None:
    """What a run leaves before its first step."""

    def begin() -> None:
        if resolved.config.overwrite_output_dir:
            discard_run(output_dir)
        _record(resolved, output_dir, data, model)

    mesh.once(begin)


def _record(resolved: Resolved[C], output_dir: Path, data: TrainingData, model: Decoder) -> None:
    resolved.save(output_dir / RUN_FILE)
    atomic_write_text(output_dir / "data_report.json", json.dumps(data.reports, indent=1) + "\n")
    total, trained = _num_parameters(model)
    facts = {"parameters": total, "trained": trained}
    atomic_write_text(output_dir / "model.json", json.dumps(facts, indent=1) + "\n")
    atomic_write_text(output_dir / "environment.json", json.dumps(describe_environment(), indent=1) + "\n")


def _final_evaluation(loop: Loop, step: int) -> Mapping[str, float] | None:
    """The evaluation of the weights of ``step``: the one in the log, or made now and logged."""
    known = [record for record in loop.log.records() if record["step"] == step and _is_evaluation(record)]
    if known or loop.evaluate is None:
        return known[-1] if known else None
    return loop.evaluate_now(step)


def _is_evaluation(record: Mapping[str, float]) -> bool:
    return any(key.startswith("eval_") for key in record)


def _plan(config: C, recipe: Recipe[C], total: int) -> str:
    passes, others = config.gradient_accumulation_steps, batches_per_step(config) // config.gradient_accumulation_steps
    in_passes = f" in {passes} passes" if passes > 1 else ""
    in_passes += f" on each of {others} processes" if others > 1 else ""
    epochs = f" ({config.num_train_epochs:g} epochs)" if config.max_steps <= 0 else ""
    rate = f"{config.optim}, learning rate {config.learning_rate:g}, {config.lr_scheduler_type}"
    return f"training: {total:,} steps{epochs} of {recipe.plan(config)}{in_passes}; {rate}; into {config.output_dir}"


def _num_parameters(model: Decoder) -> tuple[int, int]:
    """All of them, and those that train."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(count for count, _ in counts), sum(count for count, trains in counts if trains)


def _describe(model: Decoder, *, fresh: bool) -> str:
    total, trained = _num_parameters(model)
    share = f", training {trained:,} of them ({trained / total:.2%})" if trained < total else ", training all"
    name = str(model.embedding.weight.dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    workers = "1 thread" if threads == 1 else f"{threads} threads"
    kind = "fresh weights" if fresh else "weights"
    return f"model: {total:,} parameters{share}; {kind} in {name}; {workers}"


__all__ = ["Recipe", "TrainResult", "evaluate_only", "run", "total_steps", "train"]
