"""A LoRA adapter that makes one model of another: the best one of its rank, for each weight.

By Eckart and Young (1936) that is the delta on the space of its first singular vectors, which are eigenvectors of its
Gram matrix on the smaller side.

Shapes: O out, I in features, r rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from oarsmith.adapters.lora import Lora
from oarsmith.adapters.peft_layout import PREFIX, WEIGHTS, shortest_names
from oarsmith.atomic import atomic_directory, atomic_write_text
from oarsmith.checkpoint.hf import projection_places
from oarsmith.checkpoint.safetensors_stream import SafetensorsWriter, TensorInfo
from oarsmith.errors import ModelError
from oarsmith.merge.models import MergeModel, ModelFiles, open_for_merge
from oarsmith.merge.stream import Progress
from oarsmith.model_path import ADAPTER_CONFIG
from oarsmith.models import families
from oarsmith.models.names import Place, transposed


@dataclass(frozen=True)
class Extracted:
    """An adapter that was written.

    Attributes:
        ranks: of each projection that changed.
        explained: share of the squared change of all projections that the adapter has.
        left_out: changed tensors that no LoRA adapter of projections holds (norms, embeddings, biases).
    """

    ranks: Mapping[str, int]
    explained: float
    left_out: tuple[str, ...]


def low_rank(delta_OI: Tensor, rank: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """A [r, I] and B [O, r] with B A the nearest matrix of that rank, both of the same size.

    Args:
        tolerance: singular values below this share of the largest are left out; so the rank may be lower.
    """
    wide = delta_OI.shape[0] < delta_OI.shape[1]
    narrow = (delta_OI.T if wide else delta_OI).double()  # [larger, smaller]
    squares, vectors = torch.linalg.eigh(narrow.T @ narrow)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    values = squares.sqrt()
    # What is left of a zero in float64 is no direction.
    floor = max(tolerance, 1e-7) * float(values[0]) if len(values) else 0.0
    count = max(int((values[:rank] > floor).sum()), 1)
    right, scale = vectors[:, :count], values[:count].clamp(min=1e-30).sqrt()
    left = narrow @ right / scale
    right = right * scale
    b, a = (right, left.T) if wide else (left, right.T)
    return a.float().contiguous(), b.float().contiguous()


@torch.no_grad()
def extract_lora(
    base: ModelFiles, other: Path, output: Path, rank: int, tolerance: float, progress: Progress
) -> Extracted:
    """Write the adapter that makes the model in ``other`` of ``base``, in PEFT's layout.

    Raises:
        OarsmithError: the two are of different architectures, or nothing changed.
    """
    one, two = open_for_merge(base), open_for_merge(ModelFiles(str(other), other))
    try:
        if one.spec is None:
            raise ModelError(
                "the family is not known, so its projections are not", where=base.reference, fix="write a model instead"
            )
        names = families.find(one.config).names(one.spec)
        places = projection_places(names)
        found, left_out, squares = _factors(one, two, places, rank, tolerance, progress)
    finally:
        one.close()
        two.close()
    if not found:
        raise ModelError(
            "no projection has changed: there is no adapter to write", where=base.reference, fix="look at the models"
        )
    with atomic_directory(output) as folder:
        _write(folder, base, found, places)
    ranks = {module: a.shape[0] for module, (a, _) in found.items()}
    return Extracted(ranks, squares[1] / squares[0], tuple(left_out))


Factors = dict[str, tuple[Tensor, Tensor]]


def _factors(
    one: MergeModel, two: MergeModel, places: Mapping[str, Place], rank: int, tolerance: float, progress: Progress
) -> tuple[Factors, list[str], tuple[float, float]]:
    found: Factors = {}
    left_out, whole, kept = [], 0.0, 0.0
    for done, name in enumerate(one.shapes, start=1):
        if two.shapes.get(name) != one.shapes[name]:
            raise ModelError(
                f"tensor {name} has another shape in the merged model", where=name, fix="keep vocabularies"
            )
        delta = two.read(name).float().sub_(one.read(name).float())
        module = name.removesuffix(".weight")
        if bool(delta.any()):
            place = places.get(module)
            if place is None or delta.ndim != 2:
                left_out.append(name)
            else:
                delta_OI = delta.T if place.view is transposed else delta
                a_rI, b_Or = low_rank(delta_OI, rank, tolerance)
                found[module] = a_rI, b_Or
                total = float(delta.square().sum(dtype=torch.float64))
                whole += total
                kept += total - float((delta_OI - b_Or @ a_rI).square().sum(dtype=torch.float64))
        progress("extracting", done, len(one.shapes))
    return found, left_out, (whole or 1.0, kept)


def _write(folder: Path, base: ModelFiles, found: Factors, places: Mapping[str, Place]) -> None:
    tensors = {}
    for module, (a_rI, b_Or) in found.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a_rI
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b_Or
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(folder / WEIGHTS, infos) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    # alpha is the rank: the scale is in the factors.
    changes = {module: Lora(rank=a.shape[0], alpha=float(a.shape[0])) for module, (a, _) in found.items()}
    config = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.base.resolve()),
        "inference_mode": True,
        "fan_in_fan_out": any(places[module].view is transposed for module in found),
        "target_modules": shortest_names(sorted(found), list(places)),
        **Lora.peft_configs(changes),
    }
    atomic_write_text(folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
