"""``oarsmith quantize``: a model in fewer bits, a layer at a time, with a proof of what that cost."""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from rich.console import Console

from oarsmith.atomic import atomic_write_bytes, atomic_write_text, temporary_directory
from oarsmith.checkpoint.hf import GENERATION_CONFIG
from oarsmith.config.quantize import QuantizeConfig
from oarsmith.config.resolved import Resolved
from oarsmith.engine import Engine, Sampling
from oarsmith.errors import CheckpointError, ConfigError, ModelError
from oarsmith.jobs.console import make_console
from oarsmith.jobs.outputs import check_destination, check_file
from oarsmith.jobs.quantize_plan import GGUF, Plan, layout_name, make_plan, open_output, write_parts
from oarsmith.jobs.quantize_text import Documents, read_texts
from oarsmith.jobs.row_progress import RowProgress
from oarsmith.jobs.runtime import make_tokenizer, runtime
from oarsmith.model_path import resolve
from oarsmith.quantize.budget import BITS, bits_of_maps, choose_bits, measure_costs
from oarsmith.quantize.proof import Comparison, Walked, compare
from oarsmith.quantize.read_again import rounding_of
from oarsmith.quantize.report import PieceReport, Report, draw
from oarsmith.text import Tokenizer
from oarsmith.training.log import peak_memory_mb

REPORT = "quantization"
_SPEED_TOKENS = 64
# A budget: models that are made, and what of it the layers' own costs may come to at first (rounding to nearest costs
# more than the algorithms that follow).
_TRIES, _FIRST_SHARE = 4, 1.5


def run(resolved: Resolved[QuantizeConfig]) -> int:
    """The command."""
    config, console = resolved.config, make_console()
    where, output = resolve(config.model_name_or_path), Path(config.output_dir)
    if where.adapter is not None:
        fix = f"merge it first: oarsmith merge-adapter {config.model_name_or_path}"
        raise CheckpointError("this is an adapter on a base model", where=config.model_name_or_path, fix=fix)
    gguf = layout_name(config) == GGUF
    if gguf:
        if output.suffix != ".gguf":
            raise CheckpointError("a GGUF model is a file", where=str(output), fix="give it a name that ends in .gguf")
        check_file(output, config.overwrite)
    else:
        check_destination(output, config.overwrite, inputs=[where.base])
    tokenizer = make_tokenizer(config)
    with runtime(config):
        report = quantize(config, where.base, output, tokenizer, console)
        if config.measure_speed and not gguf:
            report = replace(report, original_speed=_speed(where.base), speed=_speed(output))
    for line in report.lines():
        console.print(line, soft_wrap=True)
    beside = output.with_suffix("") if report.layout == GGUF else output / REPORT
    record, picture = beside.with_suffix(".json"), beside.with_suffix(".png")
    atomic_write_text(record, json.dumps(report.record(), indent=1) + "\n")
    atomic_write_bytes(picture, draw(report))
    console.print(f"wrote {output} ({report.layout}); report: {record}, {picture}", soft_wrap=True)
    console.print(f"next:  oarsmith {'convert' if report.layout == GGUF else 'chat'} {output}")
    return 0


def quantize(config: QuantizeConfig, source: Path, output: Path, tokenizer: Tokenizer, console: Console) -> Report:
    """Quantize a directory into another, which appears only with a model within the budget.

    Raises:
        OarsmithError: a part of the model that scheme or layout have no place for, text that cannot be read, a model
            that differs more than ``kl_budget`` or ``budget``.
    """
    with ExitStack() as stack:
        folder = None
        if config.calibration_on_disk:
            folder = stack.enter_context(temporary_directory(output.with_name(f"{output.name}-calibration")))
        plan = make_plan(config, source, folder)
        calibration, windows = read_texts(config, tokenizer, plan.subject.spec.max_positions)
        if (plan.recipe.calibrates or config.budget is not None) and not calibration:
            raise ConfigError(
                f"{config.chosen_algorithm} with scheme {config.scheme} must see what goes through the model",
                where="calibration",
                fix="give a text that is like what it will read: --calibration FILE",
            )
        work = _Work(config, source, output, tokenizer, console, calibration, windows)
        limit = None if config.on_over_budget == "warn" else config.kl_budget
        made = _make(work, plan, limit) if config.budget is None else _within(work, plan)
    return Report(
        scheme=config.scheme,
        algorithm=config.chosen_algorithm,
        layout=plan.layout_name,
        pieces=tuple(made.pieces),
        comparison=made.comparison,
        file_bytes=_weights(output),
        original_bytes=_weights(source),
        seconds=made.seconds,
        peak_mb=peak_memory_mb(),
    )


@dataclass(frozen=True)
class _Work:
    """What every model of a run is made from, and judged by."""

    config: QuantizeConfig
    source: Path
    output: Path
    tokenizer: Tokenizer
    console: Console
    calibration: Documents
    windows: Documents

    @cached_property
    def original(self) -> Walked:
        """The original on the windows: however many models are compared with it, it is walked once."""
        return Walked(self.source, self.windows)


@dataclass(frozen=True)
class Made:
    """A model that was written. ``seconds``: without the comparison, and of a search without what was thrown away."""

    pieces: list[PieceReport]
    comparison: Comparison | None
    seconds: float


def _make(work: _Work, plan: Plan, limit: float | None) -> Made:
    """Write a model, and prove it before it appears. ``limit``: its largest KL divergence, in nats."""
    found: list[Comparison] = []

    def check(directory: Path) -> None:
        if work.windows:
            found.append(_prove(work, directory))
            _require(found[0], work, limit)

    begin = time.perf_counter()
    with open_output(plan, work.output, check) as writer:
        pieces = write_parts(plan, writer, work.calibration, work.console)
        seconds = time.perf_counter() - begin
        work.tokenizer.save(writer.folder)
        if (work.source / GENERATION_CONFIG).is_file():
            text = (work.source / GENERATION_CONFIG).read_text(encoding="utf-8")
            atomic_write_text(writer.folder / GENERATION_CONFIG, text)
    return Made(pieces, found[0] if found else None, seconds)


def _within(work: _Work, plan: Plan) -> Made:
    """The bits of each layer that ``budget`` allows, and the model with them."""
    config, console = work.config, work.console
    assert config.budget is not None
    target = float(config.budget.removeprefix("kl="))
    bits = BITS if plan.layout_name == "gptq_v2" else tuple(count for count in BITS if count != 3)
    num_tokens = sum(map(len, work.calibration))
    with RowProgress(console, 0, len(plan.subject.spec.layers), "measuring", unit="layers") as progress:
        costs = measure_costs(
            plan.subject, plan.contents.scheme, work.calibration, bits, lambda done: progress.add(num_tokens)
        )
    allowed = _FIRST_SHARE * target
    for last in range(_TRIES):
        chosen = choose_bits(costs, allowed)
        own = make_plan(config, work.source, plan.recipe.folder, bits_of_maps(plan.subject, chosen))
        counts = ", ".join(f"{chosen.count(count)} in {count} bits" for count in bits if count in chosen)
        console.print(f"layers: {counts}", soft_wrap=True)
        try:
            return _make(work, own, target)
        except OverBudgetError as error:
            if last == _TRIES - 1:
                raise
            console.print(f"KL {error.kl:.4f} is more than {target:g}: trying more bits", soft_wrap=True)
            allowed *= 0.8 * target / error.kl
    raise AssertionError(allowed)


class OverBudgetError(ModelError):
    """A model that differs too much from its original."""

    def __init__(self, what: str, *, kl: float, where: str, fix: str) -> None:
        super().__init__(what, where=where, fix=fix)
        self.kl = kl


def _prove(work: _Work, directory: Path) -> Comparison:
    """The written model beside its original, both read from their files."""
    with RowProgress(work.console, 0, 2, "comparing", unit="models") as progress:
        num_tokens, original = sum(map(len, work.windows)), work.original
        progress.add(num_tokens)
        other = Walked(directory, work.windows, rounding_of(directory))
        progress.add(num_tokens)
        try:
            return compare(original, other, work.windows)
        finally:
            other.close()


def _require(found: Comparison, work: _Work, limit: float | None) -> None:
    if not math.isfinite(found.kl):
        fix = "check that the original gives numbers (oarsmith eval), or use more bits"
        raise ModelError("the quantized model gives no numbers; nothing was written", where="proof_text", fix=fix)
    if limit is not None and found.kl > limit:
        raise OverBudgetError(
            f"the quantized model differs by {found.kl:.4f} nats per token, and {limit:g} are allowed; nothing was "
            "written",
            kl=found.kl,
            where=work.config.model_name_or_path,
            fix="use more bits, smaller groups or another algorithm, or raise the budget",
        )
    allowed = work.config.kl_budget
    if allowed is not None and found.kl > allowed:
        what = f"the quantized model differs by {found.kl:.4f} nats per token, and kl_budget is {allowed:g}"
        work.console.print(f"warning: {what}", soft_wrap=True)


def _weights(folder: Path) -> int:
    """Bytes of the files of weights."""
    if folder.is_file():
        return folder.stat().st_size
    endings = (".safetensors", ".bin", ".pdparams")
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in endings)


def _speed(folder: Path) -> float:
    """Tokens a second that the engine writes for one prompt, the second time."""
    engine = Engine(folder)
    sampling = Sampling(max_new_tokens=_SPEED_TOKENS, ignore_eos=True)
    seconds = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        engine.generate(["The sea"], sampling)
        seconds = time.perf_counter() - begin
    return _SPEED_TOKENS / seconds
