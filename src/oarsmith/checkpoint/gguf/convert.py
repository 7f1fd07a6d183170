"""GGUF -> Hugging Face directory: config, weights, tokenizer, chat template. One tensor in memory at a time."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf.constants import GGMLQuantizationType

from oarsmith.atomic import atomic_directory, atomic_write_text
from oarsmith.checkpoint.gguf.architectures import family_of_file
from oarsmith.checkpoint.gguf.family import Config, read_config
from oarsmith.checkpoint.gguf.metadata import Metadata
from oarsmith.checkpoint.gguf.plan import ReadPlan, has_tied_head, plan_reading, read_link
from oarsmith.checkpoint.gguf.reader import GgufFile
from oarsmith.checkpoint.gguf.tokenizer import GgufTokenizer, build_tokenizer
from oarsmith.checkpoint.safetensors_stream import ShardedSafetensorsWriter, TensorInfo
from oarsmith.errors import CheckpointError

_DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did. `tensor_types` counts the source's tensors by type; `notes` are decisions worth a look."""

    source: Path
    destination: Path
    architecture: str
    model_type: str
    dtype: str
    num_tensors: int
    num_parameters: int
    num_bytes: int
    tied_head: bool
    tensor_types: Mapping[str, int]
    notes: tuple[str, ...]


def convert_gguf(
    src: Path, dst: Path, dtype: str = "auto", progress: Progress | None = None, *, overwrite: bool = False
) -> ConvertReport:
    """Write the Hugging Face directory `dst` from the GGUF file `src`. `dst` appears complete or not at all.

    Args:
        dtype: dtype of the written weights. ``auto`` keeps a float32 or float16 file's own and takes bfloat16 for
            bfloat16 and quantized files. Values are dequantized in float32 and then cast.
        progress: called with (bytes read, bytes in all) after each tensor.
        overwrite: replace a directory `dst`, in one step at the end.

    Raises:
        CheckpointError: damaged or unsupported file, unknown architecture or tokenizer, `dst` not empty, disk full.
    """
    if dst.exists() and (not dst.is_dir() or (any(dst.iterdir()) and not overwrite)):
        raise CheckpointError(
            "the destination exists and is not empty", where=str(dst), fix="remove it or choose another"
        )
    file = GgufFile(src)
    metadata = Metadata(file)
    family = family_of_file(metadata)
    config = read_config(family, metadata)
    where = Config(config, str(src))
    dims = family.dims(where)
    target_dtype = _choose_dtype(file, dtype)
    tied = has_tied_head(file)
    plans = plan_reading(file, family.links(where, dims), dims, tied=tied)
    tokenizer = build_tokenizer(file, architecture=metadata.architecture, context=dims["context"])
    if tokenizer.num_tokens > dims["vocab"]:
        raise CheckpointError(
            f"{tokenizer.num_tokens} tokens, but the embedding has {dims['vocab']} rows", where=str(src)
        )
    config |= {"tie_word_embeddings": tied, "torch_dtype": str(target_dtype).removeprefix("torch.")}
    config |= {f"{role}_token_id": tokenizer.special_ids.get(role) for role in ("bos", "eos", "pad")}
    tensors = {name: TensorInfo(target_dtype, shape) for plan in plans for name, shape in plan.targets().items()}
    num_bytes = sum(info.num_bytes for info in tensors.values())
    with atomic_directory(dst, num_bytes=num_bytes) as directory:
        atomic_write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")
        atomic_write_text(
            directory / "generation_config.json", json.dumps(_generation_config(tokenizer), indent=2) + "\n"
        )
        for name, text in tokenizer.files.items():
            atomic_write_text(directory / name, text)
        _write_weights(directory, file, plans, tensors, progress)
    return ConvertReport(
        source=src,
        destination=dst,
        architecture=metadata.architecture,
        model_type=family.model_type,
        dtype=str(target_dtype).removeprefix("torch."),
        num_tensors=len(tensors),
        num_parameters=sum(math.prod(info.shape) for info in tensors.values()),
        num_bytes=num_bytes,
        tied_head=tied,
        tensor_types=dict(Counter(tensor.type.name for tensor in file.tensors.values())),
        notes=tokenizer.notes,
    )


def _choose_dtype(file: GgufFile, dtype: str) -> torch.dtype:
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise CheckpointError(f"unknown dtype {dtype!r}", fix=f"use auto or one of {', '.join(_DTYPES)}")
        return _DTYPES[dtype]
    # Norms and biases are float32 in every file: the matrices say what the file is.
    kinds = {tensor.type for tensor in file.tensors.values() if len(tensor.shape) > 1}
    if kinds == {GGMLQuantizationType.F32}:
        return torch.float32
    if kinds <= {GGMLQuantizationType.F32, GGMLQuantizationType.F16}:
        return torch.float16
    return torch.bfloat16


def _write_weights(
    directory: Path,
    file: GgufFile,
    plans: list[ReadPlan],
    tensors: Mapping[str, TensorInfo],
    progress: Progress | None,
) -> None:
    total = sum(source.num_bytes for plan in plans for source in plan.sources)
    done = 0
    with ShardedSafetensorsWriter(directory, tensors) as writer:
        for plan in plans:
            for expert in range(plan.num_experts) if plan.link.per_expert else (None,):
                names = plan.link.hf if expert is None else plan.names(expert)
                dtype = tensors[names[0]].dtype
                for name, tensor in zip(names, read_link(file, plan, dtype, expert), strict=True):
                    writer.write(name, tensor)
            done += sum(source.num_bytes for source in plan.sources)
            if progress is not None:
                progress(done, total)


def _generation_config(tokenizer: GgufTokenizer) -> dict[str, object]:
    """Generation stops at the end of a text and, where the file tells them apart, at the end of a turn."""
    ids = tokenizer.special_ids
    stops = list(dict.fromkeys(ids[role] for role in ("eos", "eot") if role in ids))
    values = {
        "bos_token_id": ids.get("bos"),
        "eos_token_id": stops if len(stops) > 1 else (stops[0] if stops else None),
        "pad_token_id": ids.get("pad"),
    }
    return {key: value for key, value in values.items() if value is not None}
