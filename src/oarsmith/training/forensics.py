"""What is kept of a step that went wrong, so that it can be run again alone: ``failure-step-N/``, ``spike-step-N/``.

| file | what |
|---|---|
| ``report.json`` | why, loss, gradient norm, learning rate, seed, step, loss scale, versions, hashes of the next two |
| ``documents.jsonl`` | each document: file:line, text, ids, weights |
| ``batch.safetensors`` | the micro-batches as tensors, and the state of the random generator before the step |
| ``statistics.json`` | by layer: what the parts gave, gradients, weights |
| ``weights/`` | the trained weights before the update, in the run's own format (a model or an adapter) |
| ``run.json`` | the run's configuration |
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from oarsmith.atomic import atomic_directory, atomic_write_text
from oarsmith.checkpoint.safetensors_stream import SafetensorsWriter, TensorInfo
from oarsmith.config.resolved import RUN_FILE
from oarsmith.data.answers import AnswerBatch, only
from oarsmith.data.batch import Batch
from oarsmith.data.policy_batch import PolicyBatch, only_answers
from oarsmith.errors import CheckpointError
from oarsmith.models.decoder import Decoder
from oarsmith.training.checkpoint import file_hash
from oarsmith.training.environment import describe_environment
from oarsmith.training.objective import Objective, StepObjective
from oarsmith.training.seeds import seed_step
from oarsmith.training.statistics import StepStatistics, measure_step
from oarsmith.training.step import StepResult

Decode = Callable[[list[int]], str]
WeightsAre = Literal["before the update", "partly updated", "after the update", "left out: too little room"]

REPORT, DOCUMENTS, BATCH, STATISTICS, WEIGHTS = (
    "report.json",
    "documents.jsonl",
    "batch.safetensors",
    "statistics.json",
    "weights",
)
# Of a batch: its size is that of its ids, and the places of its documents are in the file of these.
_NOT_TENSORS = ("num_tokens", "where", "facts", "companion")


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """What a step is run with, beside model and batches. ``step`` counts from 1; its random numbers are keyed by
    (seed, "step", step - 1)."""

    step: int
    seed: int
    learning_rate: float
    max_grad_norm: float
    loss_scale: float = 1.0


class Report(BaseModel):
    """``report.json``. Numbers that are not finite are written as words."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")

    step: int
    kind: Literal["failure", "spike"]
    reason: str
    loss: float
    grad_norm: float
    learning_rate: float
    max_grad_norm: float
    loss_scale: float
    seed: int
    weights: WeightsAre
    first_not_finite: str | None
    parameters_not_finite: list[str]
    micro_batch_losses: list[float]
    objective: dict[str, float] = {}
    config: dict[str, Any]
    environment: dict[str, Any]
    hashes: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Recorder:
    """Keeps the steps of one run that went wrong.

    Args:
        write_model: writes what trains into a directory, as for a checkpoint.
        max_spikes: most ``spike-step-N`` folders in the run folder; later spikes are not kept.
    """

    output_dir: Path
    model: Decoder
    objective: Objective
    decode: Decode
    write_model: Callable[[Decoder, Path], None]
    max_spikes: int = 3

    def failure(
        self, facts: StepFacts, reason: str, batches: Sequence[Batch], *, weights: WeightsAre = "before the update"
    ) -> Path:
        """Keep a step that could not be applied; the path of its folder."""
        return self._save("failure", facts, reason, batches, None, weights)

    def spike(
        self,
        facts: StepFacts,
        reason: str,
        batches: Sequence[Batch],
        result: StepResult,
        *,
        weights: WeightsAre = "before the update",
    ) -> Path | None:
        """Keep a step with an odd loss; None where enough of them are kept."""
        kept = {path.name for path in self.output_dir.glob("spike-step-*")} - {f"spike-step-{facts.step}"}
        if len(kept) >= self.max_spikes:
            return None
        return self._save("spike", facts, reason, batches, result, weights)

    def _save(
        self,
        kind: Literal["failure", "spike"],
        facts: StepFacts,
        reason: str,
        batches: Sequence[Batch],
        result: StepResult | None,
        weights: WeightsAre,
    ) -> Path:
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            seed_step(facts.seed, "step", facts.step - 1)
            rng = torch.get_rng_state()
            found = measure_step(self.model, self.objective, batches, loss_scale=facts.loss_scale)
        size = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        if shutil.disk_usage(self.output_dir).free < 2 * size:
            weights = "left out: too little room"
        final = self.output_dir / f"{kind}-step-{facts.step}"
        with atomic_directory(final) as folder:
            write_documents(folder / DOCUMENTS, batches, self.decode)
            _write_batches(folder / BATCH, batches, rng)
            hashes = {name: file_hash(folder / name) for name in (DOCUMENTS, BATCH)}
            report = self._report(kind, facts, reason, found, result, weights, hashes)
            atomic_write_text(folder / REPORT, report.model_dump_json(indent=1) + "\n")
            atomic_write_text(folder / STATISTICS, json.dumps(found.to_dict(), indent=1) + "\n")
            if not weights.startswith("left out"):
                (folder / WEIGHTS).mkdir()
                self.write_model(self.model, folder / WEIGHTS)
            if (self.output_dir / RUN_FILE).is_file():
                shutil.copyfile(self.output_dir / RUN_FILE, folder / RUN_FILE)
        return final

    def _report(
        self,
        kind: Literal["failure", "spike"],
        facts: StepFacts,
        reason: str,
        found: StepStatistics,
        result: StepResult | None,
        weights: WeightsAre,
        hashes: dict[str, str],
    ) -> Report:
        return Report(
            step=facts.step,
            kind=kind,
            reason=reason,
            loss=found.loss if result is None else result.total / result.count,
            grad_norm=found.grad_norm if result is None else result.grad_norm,
            learning_rate=facts.learning_rate,
            max_grad_norm=facts.max_grad_norm,
            loss_scale=facts.loss_scale,
            seed=facts.seed,
            weights=weights,
            first_not_finite=found.first_not_finite(),
            parameters_not_finite=[name for name, summary in found.weights.items() if summary.not_finite],
            micro_batch_losses=list(found.losses),
            objective=self.objective.state() if isinstance(self.objective, StepObjective) else {},
            config=self.model.config,
            environment=describe_environment(),
            hashes=hashes,
        )


@dataclass(frozen=True, kw_only=True)
class RecordedStep:
    """A kept step, read back. ``rng``: the CPU generator's state before it."""

    folder: Path
    report: Report
    batches: list[Batch]
    rng: Tensor

    @property
    def weights_dir(self) -> Path | None:
        return self.folder / WEIGHTS if (self.folder / WEIGHTS).is_dir() else None


def read_step(folder: Path) -> RecordedStep:
    """A folder that :class:`Recorder` wrote.

    Raises:
        CheckpointError: a missing or damaged file.
    """
    missing = [name for name in (REPORT, BATCH, DOCUMENTS) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"no {missing[0]} here, so this is no kept step",
            where=str(folder),
            fix="name a failure-step-N or spike-step-N folder of a run",
        )
    try:
        report = Report.model_validate_json((folder / REPORT).read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{place}: {first['msg']}", where=str(folder / REPORT)) from error
    for name in (DOCUMENTS, BATCH):
        if file_hash(folder / name) != report.hashes.get(name):
            raise CheckpointError("this file is not what was saved", where=str(folder / name))
    tensors = load_file(folder / BATCH)
    lines = (folder / DOCUMENTS).read_text(encoding="utf-8").split("\n")
    documents = [json.loads(line) for line in lines if line]
    return RecordedStep(
        folder=folder, report=report, batches=_read_batches(tensors, documents), rng=tensors["generator"]
    )


def write_documents(path: Path, batches: Sequence[Batch], decode: Decode) -> None:
    """One JSON object a document: micro-batch, file:line, text, ids, weights of the next token."""
    lines = []
    for number, batch in enumerate(batches):
        for where, start, stop in zip(batch.where, batch.bounds[:-1], batch.bounds[1:], strict=True):
            ids = batch.input_ids[start:stop].tolist()
            entry = {
                "micro_batch": number,
                "where": where,
                "text": decode(ids),
                "ids": ids,
                "weights_of_next": batch.weights[start:stop].tolist(),
            }
            lines.append(json.dumps(entry, ensure_ascii=False))
    # Half a surrogate pair, which a tokenizer may give back, becomes a question mark.
    atomic_write_text(path, ("\n".join(lines) + "\n").encode("utf-8", "replace").decode("utf-8"))


def _write_batches(path: Path, batches: Sequence[Batch], rng: Tensor) -> None:
    tensors = {"generator": rng}
    for number, batch in enumerate(batches):
        tensors |= {f"{number}/{name}": t for name, t in _tensors_of(batch).items()}
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, infos) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor.contiguous())


def _tensors_of(batch: Batch) -> dict[str, Tensor]:
    names = [field.name for field in fields(batch) if field.name not in _NOT_TENSORS]
    values = {name: getattr(batch, name) for name in names}
    # Counts keep all their digits.
    kept = {name: torch.tensor(v, dtype=torch.float64) if isinstance(v, float) else v for name, v in values.items()}
    return {name: torch.as_tensor(value).cpu() for name, value in kept.items()}


def _read_batches(tensors: Mapping[str, Tensor], documents: Sequence[Mapping[str, Any]]) -> list[Batch]:
    numbers = sorted({int(name.split("/")[0]) for name in tensors if "/" in name})
    found: list[Batch] = []
    for number in numbers:
        prefix = f"{number}/"
        own: dict[str, Any] = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        for name in ("bounds", "bounds_E", "sizes"):
            if name in own:
                own[name] = tuple(own[name].tolist())
        own |= {"num_trained": float(own["num_trained"]), "num_tokens": len(own["input_ids"])}
        own["where"] = tuple(str(entry["where"]) for entry in documents if entry["micro_batch"] == number)
        if "sampled_N" in own:
            found.append(PolicyBatch(**own, facts={}))
        else:
            found.append((AnswerBatch if "source_E" in own else Batch)(**own))
    return found


def only_document(batches: Sequence[Batch], number: int) -> Batch:
    """Document ``number`` of a step, counted from 0 over all micro-batches as in ``documents.jsonl``, on its own.

    Raises:
        CheckpointError: there is no such document, or none of its tokens is trained.
    """
    places = [(batch, index) for batch in batches for index in range(len(batch.where))]
    if not 0 <= number < len(places):
        raise CheckpointError(f"there is no document {number}", fix=f"count from 0 to {len(places) - 1}")
    batch, index = places[number]
    if isinstance(batch, PolicyBatch):
        return only_answers(batch, batch.prompts_A == index)
    if isinstance(batch, AnswerBatch):
        return only(batch, batch.prompts_A == index)
    start, stop = batch.bounds[index], batch.bounds[index + 1]
    parts = (batch.input_ids, batch.positions, batch.targets, batch.weights)
    ids, positions, targets, weights = (tensor[start:stop] for tensor in parts)
    trained = float(weights.sum(dtype=torch.float64))
    if trained == 0:
        raise CheckpointError(
            f"no token of document {number} is trained", where=batch.where[index], fix="name another one"
        )
    return Batch(
        input_ids=ids,
        positions=positions,
        bounds=(0, stop - start),
        targets=targets,
        weights=weights,
        num_tokens=stop - start,
        num_trained=trained,
        where=(batch.where[index],),
    )


def differs_by(found: float, recorded: float) -> str | None:
    """How far two numbers are from each other, in words; None where they are the same, bit for bit (NaN is NaN)."""
    if found == recorded or (math.isnan(found) and math.isnan(recorded)):
        return None
    if not (math.isfinite(found) and math.isfinite(recorded)):
        return f"{found} now, {recorded} then"
    return (
        f"{found!r} now, {recorded!r} then: {abs(found - recorded) / max(abs(recorded), 1e-30):.2g} apart, relatively"
    )
