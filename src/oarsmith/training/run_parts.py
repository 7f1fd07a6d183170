"""The files of a run folder that a report is made of, read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from oarsmith.config.resolved import RUN_FILE
from oarsmith.errors import TrainingError
from oarsmith.training.log import read_log

P = TypeVar("P")

LOG_FILE = "log.jsonl"


class _Part(BaseModel):
    """Unknown keys are let through: a newer version may write more than this one shows."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class LogRecord(_Part):
    """A line of ``log.jsonl``: training records have ``loss``, evaluation records ``eval_loss``, others ``event`` (what
    happened in one word: spike, skipped) with its ``detail``. None: not written."""

    step: int
    epoch: float | None = None
    loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    tokens: int | None = None
    trained_tokens: float | None = None
    rewards_chosen: float | None = None
    rewards_rejected: float | None = None
    eval_rewards_chosen: float | None = None
    eval_rewards_rejected: float | None = None
    eval_loss: float | None = None
    eval_perplexity: float | None = None
    eval_accuracy: float | None = None
    eval_bleu4: float | None = None
    eval_rouge1: float | None = None
    eval_rouge2: float | None = None
    eval_rougel: float | None = None
    event: str | None = None
    detail: str = ""


class Timing(_Part):
    """A line of ``timing.jsonl``; memory in MiB, since the start of the process; ``mfu`` a share of 1."""

    step: int
    tokens_per_second: float
    mfu: float | None = None
    peak_memory_mb: float


class Origin(_Part):
    """What a saved configuration says about itself."""

    job: str = ""
    provenance: dict[str, str] = Field(default_factory=dict)


class LeftOut(_Part):
    """Rows left out for one reason, with the first few of them."""

    count: int
    examples: list[str] = Field(default_factory=list)


class DataPart(_Part):
    """A ``DataReport`` as its ``to_dict`` writes it."""

    source: str
    rows: int
    kept: int
    blank_lines: int = 0
    malformed: LeftOut = LeftOut(count=0)
    dropped: dict[str, LeftOut] = Field(default_factory=dict)
    notes: dict[str, int] = Field(default_factory=dict)
    samples: int
    tokens: int
    trained_tokens: int
    max_length: int
    length_percentiles: dict[str, int] = Field(default_factory=dict)
    packing_efficiency: float | None = None


class CorpusFile(_Part):
    """One token file of a corpus: what a part of it holds, and what the run draws from it."""

    prefix: str
    share: float
    documents: int
    tokens: int
    samples: int
    epochs: float


class CorpusPart(_Part):
    """A ``PartReport`` as its ``to_dict`` writes it."""

    samples: int
    sequence_length: int
    documents: int
    tokens: int
    components: list[CorpusFile] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)


class MergeProofPart(_Part):
    """A ``MergeProof``: KL in nats per token."""

    max_logit_diff: float
    mean_kl: float
    max_kl: float
    top1_agreement: float = Field(ge=0, le=1)
    effect_kl: float
    num_positions: int


class Score(_Part):
    """Held-out questions answered right, and perplexity on unrelated text."""

    right: int
    total: int
    perplexity: float | None = None


class AnswerRow(_Part):
    """One question before and after training."""

    question: str
    before: str
    after: str
    before_right: bool
    after_right: bool


class Answers(_Part):
    """``answers.json``."""

    before: Score
    after: Score
    rows: list[AnswerRow] = Field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class RunParts:
    """A run folder. What a run did not write is None or empty."""

    output_dir: Path
    log: list[LogRecord]
    timings: list[Timing]
    config: Mapping[str, Any]
    origin: Origin
    data: Mapping[str, DataPart]
    corpus: Mapping[str, CorpusPart]
    environment: Mapping[str, Any]
    merge_proof: MergeProofPart | None
    answers: Answers | None

    @property
    def training(self) -> list[LogRecord]:
        return [record for record in self.log if record.loss is not None]

    @property
    def evaluations(self) -> list[LogRecord]:
        return [record for record in self.log if record.eval_loss is not None]

    @property
    def events(self) -> list[LogRecord]:
        return [record for record in self.log if record.event is not None]


def read_run(output_dir: Path) -> RunParts:
    """Read a run folder.

    Raises:
        TrainingError: there is no ``log.jsonl``, or a file does not hold what it should.
    """
    if not (output_dir / LOG_FILE).is_file():
        raise TrainingError(
            f"there is no {LOG_FILE}, so nothing to report",
            where=str(output_dir),
            fix="give the output_dir of a training run",
        )
    config = _read(output_dir / RUN_FILE, dict[str, JsonValue]) or {}
    data_path = output_dir / "data_report.json"
    raw_data = _read(data_path, dict[str, JsonValue]) or {}
    # One report stands alone, several have the names of their parts.
    named = {"train": raw_data} if "rows" in raw_data else raw_data
    return RunParts(
        output_dir=output_dir,
        log=_read_lines(output_dir / LOG_FILE, LogRecord),
        timings=_read_lines(output_dir / "timing.jsonl", Timing),
        config={key: value for key, value in config.items() if key != "oarsmith"},
        origin=_check(output_dir / RUN_FILE, Origin, config.get("oarsmith", {})),
        data=_check(data_path, dict[str, DataPart], {name: part for name, part in named.items() if not _indexed(part)}),
        corpus=_check(data_path, dict[str, CorpusPart], {name: part for name, part in named.items() if _indexed(part)}),
        environment=_read(output_dir / "environment.json", dict[str, JsonValue]) or {},
        merge_proof=_read(output_dir / "merge_proof.json", MergeProofPart),
        answers=_read(output_dir / "answers.json", Answers),
    )


def _indexed(part: JsonValue) -> bool:
    """Whether a data report is of a corpus, not of rows."""
    return isinstance(part, dict) and "components" in part


def _read(path: Path, kind: type[P]) -> P | None:
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also what is not UTF-8
        raise _unreadable(path, error) from error
    return _check(path, kind, raw)


def _read_lines(path: Path, kind: type[P]) -> list[P]:
    try:
        raw = read_log(path)
    except ValueError as error:
        raise _unreadable(path, error) from error
    return _check(path, list[kind], raw)  # type: ignore[valid-type]


def _check(path: Path, kind: type[P], raw: object) -> P:
    try:
        return TypeAdapter(kind).validate_python(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise TrainingError(
            f"{place + ': ' if place else ''}{first['msg']} (found {first['input']!r:.80})",
            where=str(path),
            fix="repair the file, or move it away: the report is made from what is there",
        ) from error


def _unreadable(path: Path, error: ValueError) -> TrainingError:
    return TrainingError(
        f"not valid JSON: {error}",
        where=str(path),
        fix="repair the file, or move it away: the report is made from what is there",
    )
