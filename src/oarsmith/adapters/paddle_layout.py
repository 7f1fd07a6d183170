"""LoRA adapters in PaddleNLP's layout, from and to PEFT's: lora_config.json and lora_model_state.pdparams.

PaddleNLP keeps ``{module}.lora_A`` [in, r] and ``{module}.lora_B`` [r, out] under its own module names; PEFT keeps
the transposes. Where PaddleNLP splits a projection that Hugging Face keeps as one (GPT-2's c_attn), A is shared and B
is cut.
Source: PaddleNLP's paddlenlp/peft/lora/lora_config.py and lora_layers.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oarsmith.adapters.lora import check_lora
from oarsmith.adapters.peft_config import CONFIG, read_adapter_config
from oarsmith.adapters.peft_layout import PREFIX, WEIGHTS, shortest_names
from oarsmith.atomic import atomic_directory, atomic_write_text
from oarsmith.checkpoint.convert import DTYPE_NAMES
from oarsmith.checkpoint.files import read_json_object
from oarsmith.checkpoint.fill import file_infos
from oarsmith.checkpoint.hf import projection_places
from oarsmith.checkpoint.paddle.config import to_paddle_config
from oarsmith.checkpoint.paddle.names import Layout, group_sizes, layout, paddle_family
from oarsmith.checkpoint.paddle.pdparams import PdparamsWriter
from oarsmith.checkpoint.paddle.ranks import Ranks
from oarsmith.checkpoint.safetensors_source import SafetensorsSource
from oarsmith.checkpoint.safetensors_stream import SafetensorsWriter, TensorInfo
from oarsmith.checkpoint.tensors import TensorSource
from oarsmith.checkpoint.verify import Digests, compare
from oarsmith.errors import CheckpointError
from oarsmith.models import families
from oarsmith.models.names import transposed

PADDLE_CONFIG = "lora_config.json"
_STEM = "lora_model_state"
_SAFETENSORS = ("peft_model.safetensors.index.json", "peft_model.safetensors")
# Options that change the arithmetic or the base model: refusing beats computing something else.
_MUST_BE_EMPTY = (
    "pissa",
    "enable_lora_list",
    "trainable_bias",
    "trainable_modules",
    "do_qat",
    "lorapro",
    "mixer",
    "nola",
)


def is_paddle_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter in PaddleNLP's layout."""
    return (directory / PADDLE_CONFIG).is_file()


@dataclass(frozen=True)
class _Module:
    """A projection: its Hugging Face name, where its weight lies in PaddleNLP, and [in, out] of each part there."""

    name: str
    where: Layout
    size: tuple[int, int]
    conv1d: bool

    def parts(self) -> list[str]:
        return [name.removesuffix(".weight") for name in self.where.names]


def _modules(config: Mapping[str, Any]) -> Iterator[_Module]:
    family, spec = families.build_spec(config)
    names = family.names(spec)
    infos = file_infos(spec, config, names, torch.float32)
    for name, place in projection_places(names).items():
        shape = infos[place.file].shape
        if len(shape) == 2:
            where = layout(paddle_family(config), place.file, 2)
            rows, columns = where.piece_shape(shape)
            yield _Module(name, where, (rows, columns), place.view is transposed)


def read_paddle_adapter_config(directory: Path) -> dict[str, Any]:
    """``lora_config.json``, refused unless it describes plain LoRA."""
    config = read_json_object(directory / PADDLE_CONFIG)
    used = [key for key in _MUST_BE_EMPTY if config.get(key)]
    if used:
        raise CheckpointError(f"LoRA with {', '.join(used)} cannot be converted", where=str(directory / PADDLE_CONFIG))
    if type(config.get("r")) is not int or config["r"] < 1:
        raise CheckpointError(f"r is {config.get('r')!r}", where=str(directory / PADDLE_CONFIG))
    return config


def peft_from_paddle(src: Path, dst: Path, config: Mapping[str, Any], *, base: str | None) -> int:
    """Write the PEFT adapter ``dst`` from PaddleNLP's ``src``; returns the number of tensors.

    Args:
        config: the base model's, in the Hugging Face spelling.
        base: what ``base_model_name_or_path`` shall say; None keeps what the adapter says.

    Raises:
        CheckpointError: not plain LoRA, damaged or missing files, tensors the base model has no place for.
    """
    theirs = read_paddle_adapter_config(src)
    ranks = Ranks.open(src, _STEM, _SAFETENSORS)
    found, modules = {}, []
    left = set(ranks.shapes)
    for module in _modules(config):
        held = [part for part in module.parts() if f"{part}.lora_A" in ranks.shapes]
        if not held:
            continue
        if len(held) != len(module.parts()):
            raise CheckpointError(f"PEFT cannot have LoRA on a part of {module.name} only", where=str(src))
        found[f"{PREFIX}{module.name}.lora_A.weight"], found[f"{PREFIX}{module.name}.lora_B.weight"] = _join(
            ranks, module, config
        )
        modules.append(module)
        left -= {f"{part}.lora_{kind}" for part in held for kind in "AB"}
    ranks.close()
    if left or not found:
        what = f"tensor {sorted(left)[0]} has no place in the base model" if left else "no LoRA tensors"
        raise CheckpointError(what, where=str(src), fix="use the adapter's own base model")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or theirs.get("base_model_name_or_path"),
        "bias": "none",
        "fan_in_fan_out": any(module.conv1d for module in modules),
        "inference_mode": True,
        "target_modules": shortest_names([m.name for m in modules], [m.name for m in _modules(config)]),
        "r": theirs["r"],
        "lora_alpha": theirs.get("lora_alpha", 8),
        "lora_dropout": theirs.get("lora_dropout", 0.0),
        "use_rslora": bool(theirs.get("rslora")),
    }
    _write(dst, found, {CONFIG: settings}, WEIGHTS, "pt")
    return len(found)


def _join(ranks: Ranks, module: _Module, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    rows, columns = module.size
    a_parts, b_parts = [], []
    for part, weight in zip(module.parts(), module.where.names, strict=True):
        b_shape = ranks.shapes.get(f"{part}.lora_B", ())
        if len(b_shape) != 2:
            raise CheckpointError(f"no matrix {part}.lora_B", where=str(ranks.directory))
        sizes = group_sizes(paddle_family(config), weight, (columns,), config)
        a_parts.append(ranks.read(f"{part}.lora_A", (rows, b_shape[0]), (b_shape[0],)))
        b_parts.append(ranks.read(f"{part}.lora_B", (b_shape[0], columns), sizes))
    if not all(torch.equal(a_parts[0], other) for other in a_parts):
        raise CheckpointError(
            f"the parts of {module.name} have different lora_A, PEFT's one projection has a single one",
            where=str(ranks.directory),
            fix="merge the adapter into its base model in PaddleNLP",
        )
    return a_parts[0].t().contiguous(), torch.cat(b_parts, dim=-1).t().contiguous()


def paddle_from_peft(src: Path, dst: Path, config: Mapping[str, Any], *, base: str | None, pickled: bool) -> int:
    """Write PaddleNLP's adapter ``dst`` from the PEFT one ``src``; the counterpart of `peft_from_paddle`."""
    described = read_adapter_config(src)
    if described.peft_type != "LORA":
        raise CheckpointError(f"adapters of type {described.peft_type!r} cannot be converted", where=str(src / CONFIG))
    check_lora(described)
    theirs = described.values
    if theirs.get("rank_pattern") or theirs.get("alpha_pattern") or theirs.get("bias", "none") != "none":
        raise CheckpointError(
            "ranks or factors that differ between modules, or biases: PaddleNLP's LoRA has one of each",
            where=str(src / CONFIG),
        )
    found: dict[str, Tensor] = {}
    leaves = set()
    with SafetensorsSource(src / WEIGHTS) as source:
        left = set(source.shapes)
        for module in _modules(config):
            names = [f"{PREFIX}{module.name}.lora_{kind_}.weight" for kind_ in "AB"]
            if names[0] in left and names[1] in left:
                parts = module.parts()
                a, b = (source.read(name).t() for name in names)
                for part, piece in zip(parts, b.chunk(len(parts), dim=-1), strict=True):
                    found[f"{part}.lora_A"], found[f"{part}.lora_B"] = a.contiguous(), piece.contiguous()
                    leaves.add(part.rsplit(".", 1)[-1])
                left -= set(names)
    if left or not found:
        what = f"tensor {sorted(left)[0]} has no place in the base model" if left else "no LoRA tensors"
        raise CheckpointError(what, where=str(src), fix="use the adapter's own base model")
    dtype = DTYPE_NAMES[next(iter(found.values())).dtype]
    settings = {
        "base_model_name_or_path": base or theirs.get("base_model_name_or_path"),
        "r": theirs.get("r", 8),
        "lora_alpha": theirs.get("lora_alpha", 8),
        "lora_dropout": theirs.get("lora_dropout") or 0.0,
        "rslora": bool(theirs.get("use_rslora")),
        "target_modules": [f".*{leaf}.*" for leaf in sorted(leaves)],
        "merge_weights": False,
        "tensor_parallel_degree": -1,
        "dtype": dtype,
    }
    file = f"{_STEM}.pdparams" if pickled else _SAFETENSORS[1]
    _write(dst, found, {PADDLE_CONFIG: settings, "config.json": to_paddle_config(config, dtype)}, file, "np")
    return len(found)


def _write(
    dst: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, Mapping[str, Any]], file: str, kind: str
) -> None:
    """Configs and weights, read back before they appear."""
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    digests = Digests()
    with atomic_directory(dst) as folder:
        for name, settings in texts.items():
            atomic_write_text(folder / name, json.dumps(settings, indent=2) + "\n")
        pickled = file.endswith(".pdparams")
        path = folder / file
        with PdparamsWriter(path, infos) if pickled else SafetensorsWriter(path, infos, metadata={"format": kind}) as w:
            for name, tensor in tensors.items():
                digests.add(name, tensor)
                w.write(name, tensor)
        written: TensorSource = Ranks.open(folder, _STEM, ()).only if pickled else SafetensorsSource(path)
        with written:
            compare(written, digests, sum(info.num_bytes for info in infos.values()))
