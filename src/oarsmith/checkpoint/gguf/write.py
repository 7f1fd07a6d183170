"""Hugging Face directory -> GGUF file that llama.cpp reads. One tensor, or one expert of many, in memory at a time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf.constants import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGMLQuantizationType, LlamaFileType

from oarsmith.checkpoint.config_file import read_config
from oarsmith.checkpoint.gguf.arch_llama import EMBEDDING, HEAD
from oarsmith.checkpoint.gguf.architectures import family_of_config
from oarsmith.checkpoint.gguf.container import GgufInfo, GgufWriter
from oarsmith.checkpoint.gguf.convert import Progress
from oarsmith.checkpoint.gguf.family import Config, Family, write_metadata
from oarsmith.checkpoint.gguf.links import Link, dim_sizes, expand
from oarsmith.checkpoint.gguf.plan import gguf_shapes
from oarsmith.checkpoint.gguf.tokenizer_write import tokenizer_metadata
from oarsmith.checkpoint.source import TensorSource, open_model
from oarsmith.errors import CheckpointError
from oarsmith.models.families import scoring

_Q = GGMLQuantizationType
_TYPES: Mapping[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (_Q.F32, LlamaFileType.ALL_F32),
    "f16": (_Q.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (_Q.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (_Q.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (_Q.Q4_0, LlamaFileType.MOSTLY_Q4_0),
    "q4_1": (_Q.Q4_1, LlamaFileType.MOSTLY_Q4_1),
    "q4_k": (_Q.Q4_K, LlamaFileType.MOSTLY_Q4_K_S),
}
_FOUR_BITS = (_Q.Q4_0, _Q.Q4_1, _Q.Q4_K)
_ALWAYS_F32 = re.compile(r"(.*_norm|blk\.\d+\.ffn_gate_inp(_shexp)?|position_embd)\.weight|.*(?<!\.weight)")
_FLOATS = ("F64", "F32", "F16", "BF16")
# Buffers that some files hold and nothing needs; layers behind the last one (multi-token prediction) are dropped too.
_IGNORED = re.compile(r".*(rotary_emb\.inv_freq|rotary_pos_emb\.inv_freq|\.attn\.(masked_)?bias)")
_LAYER = re.compile(r".*?\.(?:layers|h)\.(\d+)\..*")


@dataclass(frozen=True)
class GgufReport:
    """What was written. `tensor_types` counts tensors by type; `notes` are what the reader of the file should know."""

    destination: Path
    architecture: str
    model_type: str
    num_tensors: int
    num_bytes: int
    tensor_types: Mapping[str, int]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _WritePlan:
    """One link: names on the source's side (for each expert in turn) and its GGUF tensors."""

    link: Link
    sources: tuple[tuple[str, ...], ...]
    targets: Mapping[str, GgufInfo]


def write_gguf(
    directory: Path,
    dst: Path,
    *,
    type: str = "bf16",
    progress: Progress | None = None,
    overwrite: bool = False,
    with_tokenizer: bool = True,
    importance: Mapping[str, torch.Tensor] | None = None,
) -> GgufReport:
    """Write the model of `directory` as the GGUF file `dst`, which appears complete or not at all.

    Args:
        type: f32, f16, bf16, q8_0, q4_0, q4_1 or q4_k: what matrices are stored as. Norms, biases and routers are
            float32 in every file. A matrix whose rows do not fill blocks of 32 stays float16; of q4_k, one whose rows
            do not fill blocks of 256 is q5_0. With 4 bits the output head (a tied embedding too) is q8_0, where
            llama.cpp takes q6_K.
        progress: called with (bytes written, bytes in all) after each tensor.
        overwrite: replace an existing file, in one step at the end.
        importance: by the names of the directory's tensors, how much an error in each of a weight's inputs counts [I];
            q4_k minimises the error so weighted (llama.cpp's imatrix).
        with_tokenizer: put the tokenizer into the file; without it llama.cpp can compute, but not read text.

    Raises:
        CheckpointError: a family or option llama.cpp does not know, a tokenizer it cannot express, missing, surplus,
            misshapen or quantized tensors, `dst` exists, disk full.
    """
    require_target(dst, type, overwrite=overwrite)
    where = str(directory / "config.json")
    scoring.require_text(read_config(directory), "GGUF has no place for its scores here")
    family = family_of_config(Config(read_config(directory), where))
    values, source = open_model(directory)
    config = Config(values, where)
    notes: list[str] = []
    with source:
        dims = family.dims(config)
        plans = _plan(source, config, family, dims, type)  # first: it holds config.json's sizes against the tensors
        own, factors = write_metadata(family, config, dims, notes)
        metadata = _general(family, directory, type)
        metadata |= {f"{family.arch}.{key}": value for key, value in own.items()}
        if with_tokenizer:
            metadata |= tokenizer_metadata(directory, dims["vocab"], notes)
        tensors = {name: GgufInfo((len(numbers),), _Q.F32) for name, numbers in factors.items()}
        for plan in plans:
            tensors |= plan.targets
        with GgufWriter(dst, metadata, tensors) as writer:
            for name, numbers in factors.items():
                writer.write(name, torch.tensor(numbers, dtype=torch.float32))
            _write_tensors(source, plans, writer, importance or {}, progress)
    return GgufReport(
        destination=dst,
        architecture=family.arch,
        model_type=family.model_type,
        num_tensors=len(tensors),
        num_bytes=writer.num_bytes,
        tensor_types=dict(Counter(info.type.name for info in tensors.values())),
        notes=tuple(notes),
    )


def require_target(dst: Path, type: str, *, overwrite: bool) -> None:
    """Refuse before anything is read.

    Raises:
        CheckpointError: a type that is not written, or `dst` exists.
    """
    if type not in _TYPES:
        raise CheckpointError(f"unknown GGUF type {type!r}", fix=f"use one of {', '.join(_TYPES)}")
    if dst.is_dir() or (dst.exists() and not overwrite):
        raise CheckpointError("the destination exists", where=str(dst), fix="remove it or choose another")


def _general(family: Family, directory: Path, type: str) -> dict[str, Any]:
    return {
        "general.architecture": family.arch,
        "general.type": "model",
        "general.name": directory.resolve().name,
        "general.file_type": int(_TYPES[type][1]),
        "general.quantization_version": GGML_QUANT_VERSION,
    }


def _write_tensors(
    source: TensorSource,
    plans: Sequence[_WritePlan],
    writer: GgufWriter,
    importance: Mapping[str, torch.Tensor],
    progress: Progress | None,
) -> None:
    total = sum(info.num_bytes for plan in plans for info in plan.targets.values())
    done = 0
    for plan in plans:
        for index, names in enumerate(plan.sources):
            tensors = [source.read(name) for name in names]
            if plan.link.change.arithmetic:
                tensors = [tensor.float() for tensor in tensors]
            for name, tensor in zip(plan.targets, plan.link.change.to_gguf(tensors), strict=True):
                # What goes into a fused weight, or comes out of one, has the same inputs.
                weights_I = importance.get(names[0])
                writer.write(name, tensor, index=index if plan.link.per_expert else None, importance_I=weights_I)
        done += sum(info.num_bytes for info in plan.targets.values())
        if progress is not None:
            progress(done, total)


def _plan(source: TensorSource, config: Config, family: Family, dims: dict[str, int], type: str) -> list[_WritePlan]:
    if dims["layers"] > len(source.shapes):  # bounds what is done for each layer
        raise config.error(
            family.spell("layers") or "", f"{dims['layers']:,} layers, but there are {len(source.shapes):,} tensors"
        )
    names = _Names(source)
    tied = bool(config.get("tie_word_embeddings", family.tied))
    plans: list[_WritePlan] = []
    for template in family.links(config, dims):
        head = template.parts[0].name == HEAD
        if head and tied:
            names.drop(template.hf[0])
            continue
        layers = expand(template)
        found = [names.has(item) for item in layers]
        if not (template.required or any(found) or head):
            continue
        for item in layers:
            plans.append(_plan_link(names, item, config, dims, type, tied=tied))
    if tied and family.stores_tied_head:
        embedding = next(plan for plan in plans if EMBEDDING in plan.targets)
        plans.append(_WritePlan(embedding.link, embedding.sources, {HEAD: embedding.targets[EMBEDDING]}))
    names.require_nothing_left(dims["layers"])
    return plans


def _plan_link(names: _Names, link: Link, config: Config, dims: dict[str, int], type: str, *, tied: bool) -> _WritePlan:
    count = dims["experts"] if link.per_expert else 1
    sources = tuple(names.take([name.replace("{e}", str(index)) for name in link.hf]) for index in range(count))
    targets = {}
    for group in sources:
        shapes = _shapes(names.source, link, group)
        for part, shape in zip(link.parts, shapes, strict=True):
            full = (count, *shape) if link.per_expert else shape
            expected = dim_sizes(part.shape, dims)
            if full != expected:
                raise CheckpointError(
                    f"tensor {group[0]} has shape {names.source.shapes[group[0]]}, which gives {part.name} {full}; the "
                    f"config asks for {part.shape} = {expected}",
                    where=str(names.source.directory),
                    fix="config.json and weights do not belong together; copy both from the same model",
                )
            targets[part.name] = GgufInfo(full, _type_of(part.name, full, type, tied=tied))
    return _WritePlan(link, sources, targets)


def _shapes(source: TensorSource, link: Link, names: Sequence[str]) -> list[tuple[int, ...]]:
    for name in names:
        if source.dtypes[name] not in _FLOATS:
            raise CheckpointError(
                f"tensor {name} is stored as {source.dtypes[name]}: quantized weights",
                where=str(source.directory),
                fix="use the model's unquantized checkpoint",
            )
    try:
        return gguf_shapes(link, [source.shapes[name] for name in names])
    except (RuntimeError, IndexError):  # how a reshape refuses sizes that do not fit
        return [source.shapes[names[0]]] * len(link.parts)


def _type_of(name: str, shape: tuple[int, ...], type: str, *, tied: bool) -> GGMLQuantizationType:
    """As convert_hf_to_gguf.py and llama-quantize choose."""
    kind = _TYPES[type][0]
    if len(shape) == 1 or _ALWAYS_F32.fullmatch(name):
        return _Q.F32
    if kind in _FOUR_BITS and (name == HEAD or (tied and name == EMBEDDING)):
        kind = _Q.Q8_0
    if kind is _Q.Q4_K and shape[-1] % GGML_QUANT_SIZES[kind][0]:
        kind = _Q.Q5_0
    return _Q.F16 if shape[-1] % GGML_QUANT_SIZES[kind][0] else kind


class _Names:
    """The source's tensors by their canonical names, and which of them have found a place."""

    def __init__(self, source: TensorSource) -> None:
        self.source = source
        self._left = dict.fromkeys(source.shapes)

    def _actual(self, name: str) -> str | None:
        """Some files leave out the first word of the name ("transformer.", "model.")."""
        return next((actual for actual in (name, name.partition(".")[2]) if actual in self._left), None)

    def has(self, link: Link) -> bool:
        return any(self._actual(name.replace("{e}", "0")) for name in link.hf)

    def drop(self, name: str) -> None:
        self._left.pop(self._actual(name) or "", None)

    def take(self, names: Sequence[str]) -> tuple[str, ...]:
        found = []
        for name in names:
            actual = self._actual(name)
            if actual is None:
                raise CheckpointError(
                    f"the tensor {name} is missing",
                    where=str(self.source.directory),
                    fix="check that config.json describes these weights",
                )
            del self._left[actual]
            found.append(actual)
        return tuple(found)

    def require_nothing_left(self, num_layers: int) -> None:
        for name in self._left:
            layer = _LAYER.fullmatch(name)
            if not _IGNORED.fullmatch(name) and not (layer and int(layer[1]) >= num_layers):
                raise CheckpointError(
                    f"tensor {name} has no place in a GGUF file of this family",
                    where=str(self.source.directory),
                    fix="check that config.json describes these weights",
                )
