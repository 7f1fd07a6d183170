"""``oarsmith quantize``: a model in fewer bits, a layer at a time, with a proof of what that cost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console

from oarsmith.atomic import atomic_write_bytes, atomic_write_text
from oarsmith.checkpoint.hf import DTYPES, GENERATION_CONFIG
from oarsmith.config.quantize import QuantizeConfig
from oarsmith.config.resolved import Resolved
from oarsmith.engine import Engine, Sampling
from oarsmith.errors import CheckpointError, ConfigError, ModelError
from oarsmith.jobs.console import make_console
from oarsmith.jobs.convert import check_destination
from oarsmith.jobs.quantize_text import Documents, read_texts
from oarsmith.jobs.row_progress import RowProgress
from oarsmith.jobs.runtime import make_tokenizer, runtime
from oarsmith.model_path import resolve
from oarsmith.quantize.choose import algorithm_of, recipe_of, scheme_of
from oarsmith.quantize.layouts.base import Layout, LayoutWriter, open_layout
from oarsmith.quantize.layouts.choose import layout_of
from oarsmith.quantize.layouts.contents import Contents, contents_of
from oarsmith.quantize.model import Part, Recipe, Subject, quantize_parts
from oarsmith.quantize.proof import Comparison, Walked, compare
from oarsmith.quantize.read_again import rounding_of
from oarsmith.quantize.report import PieceReport, Report, draw
from oarsmith.text import Tokenizer
from oarsmith.training.log import peak_memory_mb

REPORT, PICTURE = "quantization.json", "quantization.png"
_SPEED_TOKENS = 64
_SCALES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def run(resolved: Resolved[QuantizeConfig]) -> int:
    """The command."""
    config, console = resolved.config, make_console()
    where, output = resolve(config.model_name_or_path), Path(config.output_dir)
    if where.adapter is not None:
        fix = f"merge it first: oarsmith merge-adapter {config.model_name_or_path}"
        raise CheckpointError("this is an adapter on a base model", where=config.model_name_or_path, fix=fix)
    check_destination(output, config.overwrite_output_dir, inputs=[where.base])
    tokenizer = make_tokenizer(config)
    with runtime(config):
        report = quantize(config, where.base, output, tokenizer, console)
        if config.measure_speed:
            report = replace(report, original_speed=_speed(where.base), speed=_speed(output))
    for line in report.lines():
        console.print(line, soft_wrap=True)
    atomic_write_text(output / REPORT, json.dumps(report.record(), indent=1) + "\n")
    atomic_write_bytes(output / PICTURE, draw(report))
    console.print(f"wrote {output} ({report.layout}), with {REPORT} and {PICTURE}", soft_wrap=True)
    console.print(f"next:  oarsmith chat {output}")
    return 0


@dataclass(frozen=True)
class Plan:
    """Everything that is known before a weight is read."""

    subject: Subject
    recipe: Recipe
    contents: Contents
    layout: Layout


def make_plan(config: QuantizeConfig, source: Path, folder: Path | None, bits: dict[str, int] | None = None) -> Plan:
    """What becomes of a model.

    Args:
        bits: of maps, by patterns of their names, where they have been searched.

    Raises:
        OarsmithError: the model cannot be read, or scheme or layout have no place for a part of it.
    """
    name = config.layout
    if name == "auto":
        name = "gptq" if config.scheme == "w3a16" else "compressed-tensors"
    probe = recipe_of(config, scheme_of(config, "fp32", bits), folder)
    subject = Subject(source, probe)
    dtype = subject.source.stored_dtype() if config.dtype == "auto" else DTYPES[config.dtype]
    layout = layout_of(name, contents_of(subject.config, probe.scheme, dtype))
    # Numbers are chosen for scales as the files will hold them.
    scheme = scheme_of(config, _SCALES[layout.scale_dtype(dtype)], bits)
    contents = contents_of(subject.config, scheme, dtype)
    return Plan(subject, recipe_of(config, scheme, folder), contents, layout_of(name, contents))


def quantize(config: QuantizeConfig, source: Path, output: Path, tokenizer: Tokenizer, console: Console) -> Report:
    """Quantize a directory into another, which appears only with a model within the budget.

    Raises:
        OarsmithError: a part of the model that scheme or layout have no place for, text that cannot be read, a model
            that differs more than ``kl_budget``.
    """
    with TemporaryDirectory(dir=output.absolute().parent, prefix=".tmp-calibration-") as folder:
        plan = make_plan(config, source, Path(folder) if config.calibration_on_disk else None)
        calibration, windows = read_texts(config, tokenizer, plan.subject.spec.max_positions)
        if plan.recipe.calibrates and not calibration:
            raise ConfigError(
                f"{algorithm_of(config)} with scheme {config.scheme} must see what goes through the model",
                where="calibration",
                fix="give a text that is like what it will read: --calibration FILE",
            )
        found: list[Comparison] = []

        def check(directory: Path) -> None:
            if windows:
                found.append(prove(source, directory, windows, console))
                _require(found[0], config, console)

        begin = time.perf_counter()
        with open_layout(plan.layout, plan.contents, output, check=check) as writer:
            pieces = write_parts(plan, writer, calibration, console)
            seconds = time.perf_counter() - begin
            tokenizer.save(writer.folder)
            _copy_generation_config(source, writer.folder)
    return Report(
        scheme=config.scheme,
        algorithm=algorithm_of(config),
        layout=plan.layout.name,
        pieces=tuple(pieces),
        comparison=found[0] if found else None,
        file_bytes=_weights(output),
        original_bytes=_weights(source),
        seconds=seconds,
        peak_mb=peak_memory_mb(),
    )


def write_parts(plan: Plan, writer: LayoutWriter, calibration: Documents, console: Console) -> list[PieceReport]:
    """Quantize and write a model part by part."""
    reports: list[PieceReport] = []
    total = len(plan.subject.spec.layers)
    num_tokens = sum(map(len, calibration))
    progress = RowProgress(console, 0, total, "layers")
    with progress:
        for part in quantize_parts(plan.subject, plan.recipe, calibration):
            write_part(plan, writer, part)
            for results in part.pieces.values():
                reports += [PieceReport.of(part.layer or 0, result) for result in results]
            if part.layer is not None:
                progress.add(num_tokens)
    return reports


def write_part(plan: Plan, writer: LayoutWriter, part: Part) -> None:
    """A part's tensors, each as its quantized pieces or in floats."""
    for place in plan.contents.places:
        if place.parameter not in part.parameters:
            continue
        results = part.pieces.get(place.file.removesuffix(".weight"))
        if results is None:
            writer.plain(place.file, place.view(part.parameters[place.parameter]))
            continue
        scale = results[0].input_scale
        quantized = [result.quantized for result in results]
        writer.map(results[0].piece.stem, quantized, None if scale is None else torch.tensor([scale]))
    if part.cache is not None and part.layer is not None:
        writer.cache(part.layer, *part.cache)


def prove(source: Path, directory: Path, windows: Sequence[Sequence[int]], console: Console) -> Comparison:
    """The written model beside its original, both read from their files."""
    progress = RowProgress(console, 0, 2, "comparing")
    with progress:
        num_tokens = sum(map(len, windows))
        original = Walked(source, windows)
        progress.add(num_tokens)
        try:
            other = Walked(directory, windows, rounding_of(directory))
            progress.add(num_tokens)
            try:
                return compare(original, other, windows)
            finally:
                other.close()
        finally:
            original.close()


def _require(found: Comparison, config: QuantizeConfig, console: Console) -> None:
    if config.kl_budget is None or found.kl <= config.kl_budget:
        return
    what = f"the quantized model differs by {found.kl:.4f} nats per token, and kl_budget is {config.kl_budget:g}"
    if config.on_over_budget == "warn":
        console.print(f"warning: {what}", soft_wrap=True)
        return
    fix = "use more bits, smaller groups or another algorithm, or raise kl_budget"
    raise ModelError(f"{what}; nothing was written", where=config.model_name_or_path, fix=fix)


def _copy_generation_config(source: Path, folder: Path) -> None:
    if (source / GENERATION_CONFIG).is_file():
        text = (source / GENERATION_CONFIG).read_text(encoding="utf-8")
        atomic_write_text(folder / GENERATION_CONFIG, text)


def _weights(folder: Path) -> int:
    """Bytes of the files of weights."""
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
