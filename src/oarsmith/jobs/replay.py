"""``oarsmith replay``: run one kept training step again, alone, and show layer by layer what happens in it."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Column, Table

from oarsmith.adapters.peft_config import CONFIG as ADAPTER_CONFIG
from oarsmith.adapters.peft_config import read_adapter_config
from oarsmith.adapters.peft_layout import load_adapter_weights
from oarsmith.atomic import atomic_write_text
from oarsmith.checkpoint.config_file import read_config
from oarsmith.config.load import load_config
from oarsmith.config.registry import config_class
from oarsmith.config.replay import ReplayConfig
from oarsmith.config.resolved import RUN_FILE, Resolved
from oarsmith.config.train import TrainConfig
from oarsmith.errors import CheckpointError
from oarsmith.jobs.console import make_console
from oarsmith.jobs.runtime import runtime
from oarsmith.jobs.start import Start
from oarsmith.jobs.train import Recipe
from oarsmith.models.decoder import Decoder
from oarsmith.training.environment import describe_environment
from oarsmith.training.forensics import RecordedStep, differs_by, only_document, read_step
from oarsmith.training.objective import StepObjective
from oarsmith.training.statistics import StepStatistics, Summary, measure_step

EXIT_NOT_FINITE = 1
# Jobs whose steps can be kept; each module has a RECIPE.
_JOBS = {job: f"oarsmith.jobs.{job}" for job in ("sft", "pretrain", "dpo", "kto", "reward", "grpo")}
_MOST_GRADIENTS = 12
_VALUES: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


def run(resolved: Resolved[ReplayConfig]) -> int:
    """The command: 0 where loss and gradients are finite this time, 1 where they are not."""
    config, console = resolved.config, make_console()
    step = read_step(Path(config.step_dir))
    run_config, recipe = _run_of(step, config)
    console.print(f"step {step.report.step}: {step.report.reason}")
    batches = step.batches if config.document is None else [only_document(step.batches, config.document)]
    with runtime(run_config) as device:
        model = _load(step, run_config, recipe, device)
        objective = recipe.objective(run_config)
        if isinstance(objective, StepObjective):
            objective.load_state(step.report.objective)
        torch.set_rng_state(step.rng)
        found = measure_step(model, objective, batches, loss_scale=step.report.loss_scale)
    _show(console, found, step)
    same = config.document is None and run_config.dtype == _given(step)["dtype"]
    _compare(console, found, step, same=same)
    if config.output_file is not None:
        result = {"loss": _plain(found.loss), "grad_norm": _plain(found.grad_norm), **found.to_dict()}
        atomic_write_text(Path(config.output_file), json.dumps(result, indent=1) + "\n")
    return 0 if found.finite else EXIT_NOT_FINITE


def _given(step: RecordedStep) -> dict[str, Any]:
    path = step.folder / RUN_FILE
    if not path.is_file():
        raise CheckpointError(
            f"no {RUN_FILE} here, so nothing says how the step was run",
            where=str(step.folder),
            fix=f"copy {RUN_FILE} of its run into it",
        )
    try:
        return _VALUES.validate_json(path.read_bytes())
    except ValidationError as error:
        raise CheckpointError(f"not the settings of a run: {error.errors()[0]['msg']}", where=str(path)) from error


def _run_of(step: RecordedStep, config: ReplayConfig) -> tuple[TrainConfig, Recipe[Any]]:
    """The run's configuration with what is to be different, and its job's parts."""
    given = _given(step)
    job = given.get("oarsmith", {}).get("job")
    if job not in _JOBS:
        raise CheckpointError(
            f"steps of the job {job!r} cannot be replayed", where=str(step.folder), fix=f"known: {', '.join(_JOBS)}"
        )
    loaded = load_config(config_class(job), str(step.folder / RUN_FILE), [])
    threads = config.num_threads or int(step.report.environment["threads"])
    changes: dict[str, Any] = {"num_threads": threads}
    if config.dtype != "auto":
        changes["dtype"] = config.dtype
    if config.kernels is not None:
        changes["kernels"] = config.kernels
    found = loaded.settle("replay", **changes).config
    assert isinstance(found, TrainConfig), job
    recipe: Recipe[Any] = vars(importlib.import_module(_JOBS[job]))["RECIPE"]
    return found, recipe


def _load(step: RecordedStep, config: TrainConfig, recipe: Recipe[Any], device: torch.device) -> Decoder:
    """The model as it was: what trained from the folder, what did not from where the run had it."""
    weights = step.weights_dir
    if weights is None:
        raise CheckpointError(
            "the weights were not kept: the disk had too little room",
            where=str(step.folder),
            fix="resume the run from its last checkpoint to come to this step again",
        )
    if not (weights / ADAPTER_CONFIG).is_file():
        return recipe.load_model(config, Start(base=weights, config=read_config(weights)), device).train()
    base = Path(str(read_adapter_config(weights).values["base_model_name_or_path"]))
    if not base.is_dir():
        raise CheckpointError(
            f"the frozen weights are not there any more: {base}",
            where=str(weights / ADAPTER_CONFIG),
            fix="put them back, or write their new place into base_model_name_or_path there",
        )
    model = recipe.load_model(config, Start(base=base, config=step.report.config), device)
    load_adapter_weights(model, weights)
    return model.train()


def _show(console: Console, found: StepStatistics, step: RecordedStep) -> None:
    first = next((name for name, summary in found.forward.items() if summary.not_finite), None)
    title = "forward: what each part gives"
    table = Table(_names(found.forward), "mean", "deviation", "largest", "not finite", "", title=title)
    for name, summary in found.forward.items():
        mark = "<- first" if name == first else ""
        table.add_row(name, *_cells(summary, summary.std), mark, style="bold red" if mark else None)
    console.print(table)
    broken = [name for name, summary in found.weights.items() if summary.not_finite]
    if broken:
        console.print(f"weights that are not finite: {', '.join(broken)}", style="bold red")
    console.print(_gradients(found.gradients))
    where = found.first_not_finite()
    if where is not None:
        console.print(f"first that is not finite: {where}", style="bold red")


def _gradients(gradients: Mapping[str, Summary]) -> Table:
    """The broken ones, else the largest."""
    broken = [item for item in gradients.items() if item[1].not_finite]
    largest = sorted(gradients.items(), key=lambda item: -item[1].norm)
    chosen: Sequence[tuple[str, Summary]] = (broken or largest)[:_MOST_GRADIENTS]
    kind = "that are not finite" if broken else "with the largest norm"
    title = f"gradients {kind} ({len(chosen)} of {len(broken or largest)})"
    table = Table(_names(dict(chosen)), "mean", "norm", "largest", "not finite", title=title)
    for name, summary in chosen:
        table.add_row(name, *_cells(summary, summary.norm))
    return table


def _plain(value: float) -> float | str:
    """JSON has no word for NaN."""
    return value if math.isfinite(value) else str(value)


def _names(summaries: Mapping[str, Summary]) -> Column:
    """Names are never cut off, however narrow the terminal."""
    return Column("name", no_wrap=True, min_width=max(map(len, summaries), default=4))


def _cells(summary: Summary, spread: float) -> tuple[str, str, str, str]:
    if summary.not_finite == summary.elements:
        return "-", "-", "-", "all"
    share = f"{summary.not_finite:,} of {summary.elements:,}" if summary.not_finite else "0"
    return f"{summary.mean:.3g}", f"{spread:.3g}", f"{summary.absmax:.3g}", share


def _compare(console: Console, found: StepStatistics, step: RecordedStep, *, same: bool) -> None:
    console.print(f"loss {found.loss:.6g}, gradient norm {found.grad_norm:.6g}")
    report = step.report
    if not same:
        console.print(f"recorded: loss {report.loss:.6g}, gradient norm {report.grad_norm:.6g} (of the whole step)")
        return
    if report.weights != "before the update":
        console.print(f"the weights kept are those {report.weights}: the numbers need not be the recorded ones")
    pairs = (("loss", found.loss, report.loss), ("gradient norm", found.grad_norm, report.grad_norm))
    apart = [f"{name}: {difference}" for name, *both in pairs if (difference := differs_by(*both)) is not None]
    if not apart:
        console.print("both are the recorded ones, bit for bit")
        return
    for line in apart:
        console.print(f"not the recorded {line}")
    now, then = describe_environment(), report.environment
    for name in ("cpu", "torch", "threads", "kernels", "oarsmith"):
        if now.get(name) != then.get(name):
            console.print(f"  {name}: {now.get(name)} now, {then.get(name)} then")
