"""Training checkpoints: ``checkpoint-N`` directories that are complete or invisible, with all that a resume needs.

``checkpoint-N/`` holds the model (or adapter) in its Hugging Face layout, ``trainer/optimizer.safetensors``,
``trainer/state.json`` and ``manifest.json`` with the size and SHA-256 of every file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from oarsmith.atomic import atomic_directory, atomic_write_text, remove_directory, remove_leftovers
from oarsmith.checkpoint.safetensors_stream import SafetensorsWriter, TensorInfo
from oarsmith.errors import CheckpointError

MANIFEST = "manifest.json"
_OPTIMIZER = "trainer/optimizer.safetensors"
_STATE = "trainer/state.json"


@dataclass(frozen=True)
class _Entry:
    bytes: int
    sha256: str


_MANIFEST: TypeAdapter[dict[str, _Entry]] = TypeAdapter(dict[str, _Entry])


class CheckpointStore:
    """The checkpoints of one output directory.

    Args:
        keep: how many to keep (``save_total_limit``); None keeps all. The best one, once named, is never removed.
    """

    def __init__(self, output_dir: Path, *, keep: int | None) -> None:
        self.output_dir = output_dir
        self.keep = keep

    def save(
        self, step: int, write_model: Callable[[Path], None], optimizer: Mapping[str, Tensor], state: Mapping[str, Any]
    ) -> Path:
        """Write ``checkpoint-{step}``; it appears at once, with everything, or not at all."""
        final = self.output_dir / f"checkpoint-{step}"
        with atomic_directory(final) as folder:
            write_model(folder)
            (folder / "trainer").mkdir()
            infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in optimizer.items()}
            with SafetensorsWriter(folder / _OPTIMIZER, infos) as writer:
                for name, tensor in optimizer.items():
                    writer.write(name, tensor)
            atomic_write_text(folder / _STATE, json.dumps(state, indent=1) + "\n")
            files = sorted(p for p in folder.rglob("*") if p.is_file())
            manifest = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": file_hash(p)} for p in files}
            atomic_write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        return final

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        names = [path.parent.name for path in self.output_dir.glob(f"checkpoint-*/{MANIFEST}")]
        return sorted(int(name.split("-")[1]) for name in names if name.split("-")[1].isdigit())

    def path(self, step: int) -> Path:
        return self.output_dir / f"checkpoint-{step}"

    def latest(self) -> Path | None:
        """The newest complete checkpoint; what killed runs left half written is removed."""
        remove_leftovers(self.output_dir)
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def prune(self, best: int | None) -> None:
        """Remove the oldest beyond the limit; the newest and the best always stay."""
        if self.keep is None:
            return
        steps = self.steps()
        removable = [step for step in steps[:-1] if step != best]
        for step in removable[: max(0, len(steps) - max(1, self.keep))]:
            remove_directory(self.path(step))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizer tensors and state, after every file has been checked against the manifest.

    Raises:
        CheckpointError: a missing or changed file (named).
    """
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise CheckpointError(
            "no complete checkpoint here", where=str(path), fix="name a checkpoint-N directory of a run"
        )
    damaged = _first_damaged(path, manifest_path.read_bytes())
    if damaged is not None:
        raise CheckpointError(
            f"the file {damaged} is missing or is not what was saved",
            where=str(path),
            fix="go on from an earlier one with resume_from_checkpoint, or remove this directory",
        )
    return load_file(path / _OPTIMIZER), json.loads((path / _STATE).read_text())


def _first_damaged(path: Path, manifest: bytes) -> str | None:
    """Name of a file that is not as the manifest says, which may be the manifest itself."""
    try:
        entries = _MANIFEST.validate_json(manifest)
    except ValidationError:
        return MANIFEST
    for name, entry in entries.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry.bytes or file_hash(file) != entry.sha256:
            return name
    return None


def file_hash(path: Path) -> str:
    """SHA-256 of a file (hexadecimal)."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
