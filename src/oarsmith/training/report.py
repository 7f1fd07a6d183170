"""The page about a run, ``report.html``, and its picture, ``loss.png``: made from the files of the run folder."""

from __future__ import annotations

import base64
import importlib.resources
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jinja2

from oarsmith._version import __version__
from oarsmith.atomic import atomic_write_bytes
from oarsmith.training.numbers import (
    show_duration,
    show_loss,
    show_percent,
    show_perplexity,
    show_rough,
    show_small,
    show_value,
)
from oarsmith.training.plots import draw_run
from oarsmith.training.policy_report import POLICY_PICTURE, PolicySection, policy_section
from oarsmith.training.run_parts import DataPart, LeftOut, LogRecord, RunParts, Timing, read_run

REPORT_FILE = "report.html"
PICTURE_FILE = "loss.png"

_MAX_EVALUATIONS = 30
_MAX_EVENTS = 50
# Scores of generated answers: field of a record, heading.
_GENERATION = (
    ("eval_bleu4", "BLEU-4"),
    ("eval_rouge1", "ROUGE-1"),
    ("eval_rouge2", "ROUGE-2"),
    ("eval_rougel", "ROUGE-L"),
)
# What the loss of a job is measured in; a job that is not named has a loss without a unit.
_LOSS_UNITS = {"sft": "nats per token", "pretrain": "nats per token"}
_SPLITS = {"train": "Training", "eval": "Evaluation"}
_ENVIRONMENT_NAMES = {
    "recorded_at": "Recorded at (UTC)",
    "oarsmith": "Oarsmith",
    "torch": "PyTorch",
    "python": "Python",
    "platform": "System",
    "cpu": "Processor",
    "usable_cpus": "Usable CPUs",
    "threads": "Threads used",
    "memory_gib": "Memory (GiB)",
    "kernels": "Fast operations",
    "gpu": "GPU",
}
# What HTML allows of the control characters is tab and line ends; a row of data may hold any.
_CONTROLS = {code: "\ufffd" for code in [*range(32), *range(127, 160)] if chr(code) not in "\t\n\r"}


@dataclass(frozen=True)
class Headline:
    """One large number with its name above and a remark below."""

    name: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class Setting:
    """A row of the configuration table."""

    key: str
    value: str
    origin: str


def write_report(output_dir: Path) -> Path:
    """Write ``report.html`` and ``loss.png`` into a run folder.

    The page stands alone (picture and style inside, no scripts, nothing from the network). Only ``log.jsonl`` must be
    there; what other files the run wrote is shown too: timing.jsonl, run.json, data_report.json, environment.json,
    merge_proof.json, answers.json.

    Returns:
        The path of the page.

    Raises:
        TrainingError: there is no ``log.jsonl``, or a file does not hold what it should.
    """
    run = read_run(output_dir)
    picture = draw_run(run.training, run.evaluations, run.events, loss_unit=_LOSS_UNITS.get(run.origin.job))
    policy = policy_section(output_dir)
    page = render(run, picture, policy)
    atomic_write_bytes(output_dir / PICTURE_FILE, picture)
    if policy is not None:
        atomic_write_bytes(output_dir / POLICY_PICTURE, policy.picture)
    target = output_dir / REPORT_FILE
    # A lone surrogate, which JSON can spell and UTF-8 cannot, becomes a question mark.
    atomic_write_bytes(target, page.translate(_CONTROLS).encode("utf-8", errors="replace"))
    return target


def render(run: RunParts, picture: bytes, policy: PolicySection | None = None) -> str:
    """The page as HTML. Every value is escaped: rows of data, names and answers may hold anything."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["loss"] = show_loss
    environment.filters["perplexity"] = show_perplexity
    environment.filters["rough"] = show_rough
    environment.filters["percent"] = show_percent
    environment.filters["small"] = show_small
    source = importlib.resources.files("oarsmith.training").joinpath("report.html.jinja").read_text(encoding="utf-8")
    given, other = settings(run.config, run.origin.provenance)
    return environment.from_string(source).render(
        title=title(run),
        subtitle=subtitle(run),
        headlines=headlines(run),
        picture=base64.b64encode(picture).decode("ascii"),
        picture_text=picture_text(run),
        policy=policy,
        policy_picture="" if policy is None else base64.b64encode(policy.picture).decode("ascii"),
        evaluations=run.evaluations[-_MAX_EVALUATIONS:],
        num_evaluations=len(run.evaluations),
        generation=generation_columns(run.evaluations),
        events=run.events[:_MAX_EVENTS],
        num_events=len(run.events),
        answers=run.answers,
        proof=run.merge_proof,
        data=[(_SPLITS.get(name, name), part) for name, part in run.data.items()],
        data_rows=data_rows(run.data),
        left_out=left_out(run.data),
        given=given,
        other=other,
        environment=[(_ENVIRONMENT_NAMES.get(key, key), show_value(value)) for key, value in run.environment.items()],
        version=__version__,
    )


def title(run: RunParts) -> str:
    """Model and data by their last names; the whole paths are in the configuration table."""
    model, dataset = (Path(str(run.config.get(key, ""))).name for key in ("model_name_or_path", "dataset_name_or_path"))
    if model and dataset:
        return f"{model} on {dataset}"
    return model or f"Run {run.output_dir.resolve().name}"


def subtitle(run: RunParts) -> str:
    """The kind of run and its extent."""
    parts = []
    if run.origin.job:
        kind = ""
        if "lora" in run.config:
            kind = f", LoRA of rank {run.config.get('lora_rank', '?')}" if run.config["lora"] else ", all weights"
        parts.append(f"oarsmith {run.origin.job}{kind}")
    if run.log:
        last = run.log[-1].step
        parts.append(f"{last:,} optimizer step{'' if last == 1 else 's'}")
    epochs = [record.epoch for record in run.training if record.epoch is not None]
    if epochs:
        parts.append(f"{epochs[-1]:.3g} epoch{'' if epochs[-1] == 1 else 's'}")
    return " · ".join(parts)


def headlines(run: RunParts) -> list[Headline]:
    """The numbers to read first; one that the run does not have is left out."""
    found = []
    if run.training:
        first, last = run.training[0], run.training[-1]
        remark = (
            f"from {show_loss(first.loss)} at step {first.step:,}" if last.step > first.step else f"step {last.step:,}"
        )
        found.append(Headline("Training loss", show_loss(last.loss), remark))
    if run.evaluations:
        last = run.evaluations[-1]
        found.append(Headline("Evaluation loss", show_loss(last.eval_loss), _perplexity_remark(last)))
    if run.training and run.training[-1].trained_tokens is not None:
        last = run.training[-1]
        remark = f"of {last.tokens:,} tokens read" if last.tokens is not None else ""
        found.append(Headline("Tokens trained", f"{last.trained_tokens:,.0f}", remark))
    speeds = [timing.tokens_per_second for timing in run.timings if math.isfinite(timing.tokens_per_second)]
    if speeds:
        found.append(Headline("Tokens per second", f"{median(speeds):,.0f}", "median, without padding"))
    shares = [timing.mfu for timing in run.timings if timing.mfu is not None and math.isfinite(timing.mfu)]
    if shares:
        found.append(Headline("MFU", f"{median(shares):.0%}", "median, of the measured matrix product rate"))
    if run.timings:
        peak = max(timing.peak_memory_mb for timing in run.timings)
        size = f"{peak / 1024:.2f} GiB" if peak >= 1024 else f"{peak:.0f} MiB"
        found.append(Headline("Peak memory", size, "resident, whole process"))
    seconds = duration(run.training, run.timings)
    if seconds is not None:
        found.append(Headline("Duration", show_duration(seconds), "training loop"))
    return found


def generation_columns(evaluations: Sequence[LogRecord]) -> list[tuple[str, list[str]]]:
    """(heading, values) of each score of generated answers that any of the shown evaluations has."""
    shown = [record.model_dump() for record in evaluations[-_MAX_EVALUATIONS:]]
    columns = [(heading, [record[field] for record in shown]) for field, heading in _GENERATION]
    return [
        (heading, ["–" if value is None else f"{value:.4f}" for value in values])
        for heading, values in columns
        if any(value is not None for value in values)
    ]


def _perplexity_remark(record: LogRecord) -> str:
    parts = []
    if record.eval_perplexity is not None:
        parts.append(f"perplexity {show_perplexity(record.eval_perplexity)}")
    if record.eval_accuracy is not None:
        parts.append(f"{show_percent(record.eval_accuracy)} of tokens right")
    return ", ".join(parts)


def duration(training: Sequence[LogRecord], timings: Sequence[Timing]) -> float | None:
    """Seconds spent in the loop: each lap's tokens divided by its speed. Time between a stop and a resume is not in it.

    None where a lap's tokens are not in the log or its speed is not a positive number.
    """
    tokens_at = {record.step: record.tokens for record in training if record.tokens is not None}
    before, seconds = 0, 0.0
    for timing in timings:
        tokens = tokens_at.get(timing.step)
        if tokens is None or not (0 < timing.tokens_per_second < math.inf):
            return None
        seconds += (tokens - before) / timing.tokens_per_second
        before = tokens
    return seconds if timings else None


def picture_text(run: RunParts) -> str:
    """What the picture shows, for those who cannot see it."""
    parts = []
    if run.training:
        first, last = run.training[0], run.training[-1]
        parts.append(
            f"training loss from {show_loss(first.loss)} at step {first.step} to {show_loss(last.loss)} at "
            f"step {last.step}"
        )
    if run.evaluations:
        first, last = run.evaluations[0], run.evaluations[-1]
        parts.append(
            f"evaluation loss from {show_loss(first.eval_loss)} at step {first.step} to {show_loss(last.eval_loss)} at "
            f"step {last.step}"
        )
    return "Loss over the steps: " + ("; ".join(parts) if parts else "nothing was logged")


def data_rows(data: Mapping[str, DataPart]) -> list[tuple[str, list[str]]]:
    """The account of the data, one row a quantity, one column a source."""
    parts = list(data.values())
    rows = [
        ("Source", [part.source for part in parts]),
        ("Rows read", [f"{part.rows:,}" for part in parts]),
        ("Rows kept", [f"{part.kept:,}" for part in parts]),
        ("Rows left out", [_count_left_out(part) for part in parts]),
        ("Blank lines", [f"{part.blank_lines:,}" for part in parts]),
        ("Samples", [f"{part.samples:,}" for part in parts]),
        ("Tokens", [f"{part.tokens:,}" for part in parts]),
        ("Tokens that are trained", [_with_share(part.trained_tokens, part.tokens) for part in parts]),
        ("Longest sample allowed (tokens)", [f"{part.max_length:,}" for part in parts]),
        ("Tokens a sample: median, 90 %, longest", [_lengths(part.length_percentiles) for part in parts]),
        ("Share of a row that packing fills", [_packing(part) for part in parts]),
    ]
    notes = dict.fromkeys(note for part in parts for note in part.notes)
    rows += [(f"Note: {note}", [f"{part.notes.get(note, 0):,}" for part in parts]) for note in notes]
    return rows


def left_out(data: Mapping[str, DataPart]) -> list[tuple[str, str, LeftOut]]:
    """(source, reason, rows) for each reason for which rows were left out, the most frequent first."""
    found = []
    for name, part in data.items():
        reasons = [*part.dropped.items(), ("malformed", part.malformed)]
        found += [(_SPLITS.get(name, name), reason, rows) for reason, rows in reasons if rows.count]
    return sorted(found, key=lambda item: -item[2].count)


def settings(config: Mapping[str, Any], provenance: Mapping[str, str]) -> tuple[list[Setting], list[Setting]]:
    """The keys someone gave, and the rest: derived ones before those with their default."""
    rows = [Setting(key, show_value(value), provenance.get(key, "")) for key, value in config.items()]
    given: list[Setting] = []
    derived: list[Setting] = []
    default: list[Setting] = []
    for row in rows:
        # A replayed run took every value from a file; what counts is where that file had it from.
        first = row.origin.rpartition(", saved from: ")[2]
        (default if first == "default" else derived if first.startswith("derived (") else given).append(row)
    return given, derived + default


def _with_share(count: int, total: int) -> str:
    return f"{count:,} ({count / total:.0%})" if total else f"{count:,}"


def _count_left_out(part: DataPart) -> str:
    return f"{part.malformed.count + sum(rows.count for rows in part.dropped.values()):,}"


def _lengths(percentiles: Mapping[str, int]) -> str:
    return ", ".join(f"{percentiles[at]:,}" for at in ("50", "90", "100") if at in percentiles) or "–"


def _packing(part: DataPart) -> str:
    return "–" if part.packing_efficiency is None else show_percent(part.packing_efficiency)
