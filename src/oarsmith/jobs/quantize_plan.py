"""What `oarsmith quantize` knows before a weight is read, and how a model is then written part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from oarsmith.atomic import temporary_directory
from oarsmith.checkpoint.gguf.convert import convert_gguf
from oarsmith.checkpoint.hf import DTYPES
from oarsmith.config.quantize import QuantizeConfig
from oarsmith.errors import ConfigError
from oarsmith.jobs.quantize_text import Documents
from oarsmith.jobs.row_progress import RowProgress
from oarsmith.models.spec_parts import GQA
from oarsmith.quantize.choose import Scales, scheme_of
from oarsmith.quantize.layouts.base import Layout, LayoutWriter, open_layout
from oarsmith.quantize.layouts.choose import layout_of
from oarsmith.quantize.layouts.contents import Contents, contents_of, usual_scheme
from oarsmith.quantize.layouts.gguf import open_gguf
from oarsmith.quantize.model import Part, Recipe, Subject, quantize_parts
from oarsmith.quantize.recipes import recipe_of
from oarsmith.quantize.report import PieceReport
from oarsmith.quantize.scheme import Scheme

GGUF = "gguf"
_SCALES: dict[torch.dtype, Scales] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_GGUF_TYPES = {8: "q8_0", 4: "q4_0"}


@dataclass(frozen=True)
class Plan:
    """Everything that is known before a weight is read. ``layout``: of a directory; None: a GGUF file."""

    subject: Subject
    recipe: Recipe
    contents: Contents
    layout: Layout | None

    @property
    def layout_name(self) -> str:
        """What users call it."""
        return GGUF if self.layout is None else self.layout.name


def make_plan(config: QuantizeConfig, source: Path, folder: Path | None, bits: dict[str, int] | None = None) -> Plan:
    """What becomes of a model.

    Args:
        bits: of maps, by patterns of their names, where they have been searched.

    Raises:
        OarsmithError: the model cannot be read, or scheme or layout have no place for a part of it.
    """
    name = layout_name(config)
    gguf = name == GGUF
    probe = recipe_of(config, scheme_of(config, "fp32", bits, gguf=gguf), folder)
    subject = Subject(source, probe)
    dtype = subject.source.stored_dtype() if config.dtype == "auto" else DTYPES[config.dtype]
    layout = None if gguf else layout_of(name, contents_of(subject.config, probe.scheme, dtype))
    # Numbers are chosen for scales as the files will hold them.
    scales = torch.float16 if layout is None else layout.scale_dtype(dtype)
    scheme = scheme_of(config, _SCALES[scales], bits, gguf=gguf)
    contents = contents_of(subject.config, scheme, dtype)
    _require_whole_inputs(contents)
    _require_heads(subject, scheme)
    return Plan(subject, recipe_of(config, scheme, folder), contents, layout and layout_of(name, contents))


def layout_name(config: QuantizeConfig) -> str:
    if config.layout != "auto":
        return config.layout
    if config.output_dir.endswith(".gguf"):
        return GGUF
    if config.scheme == "nf4":
        return "bitsandbytes"
    return "gptq_v2" if config.scheme == "w3a16" else "compressed-tensors"


def _require_whole_inputs(contents: Contents) -> None:
    for one in contents.maps.values():
        how = one.scheme.activations
        if how is not None and how.group is not None and one.in_features % how.group:
            raise ConfigError(
                f"groups of {how.group} do not divide the {one.in_features} inputs of {one.stem}",
                where="scheme",
                fix="use scheme fp8, or leave the map in floats with skip_list_names",
            )


def _require_heads(subject: Subject, scheme: Scheme) -> None:
    if scheme.cache is not None and not all(isinstance(layer.attention, GQA) for layer in subject.spec.layers):
        raise ConfigError(
            f"{subject.family.name} keeps latents or filtered keys, for which no static scales are found",
            where="scheme",
            fix="leave c8 out; 'cache_dtype int8' rounds any model's cache while it runs",
        )


@contextmanager
def open_output(
    plan: Plan, output: Path, check: Callable[[Path], None], *, with_tokenizer: bool = True
) -> Iterator[LayoutWriter]:
    """The writer of a model that appears when it is complete and ``check`` has passed its directory."""
    if plan.layout is not None:
        with open_layout(plan.layout, plan.contents, output, check=check) as writer:
            yield writer
        return
    with temporary_directory(output) as staged:
        grid = usual_scheme(plan.contents).weights
        assert grid is not None, plan.contents.scheme
        kind = _GGUF_TYPES[grid.bits]
        with open_gguf(plan.contents, staged / output.name, type=kind, with_tokenizer=with_tokenizer) as own:
            yield own
        convert_gguf(staged / output.name, staged / "back", "fp32", lambda done, total: None)
        check(staged / "back")
        (staged / output.name).replace(output)


def write_parts(plan: Plan, writer: LayoutWriter, calibration: Documents, console: Console) -> list[PieceReport]:
    """Quantize and write a model part by part."""
    reports: list[PieceReport] = []
    num_tokens = sum(map(len, calibration))
    with RowProgress(console, 0, len(plan.subject.spec.layers), "quantizing", unit="layers") as progress:
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
