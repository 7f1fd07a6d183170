"""What is kept when a step goes wrong: the batch, as ids and text, and which tensors are broken."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from oarsmith.atomic import atomic_directory, atomic_write_text
from oarsmith.data.batch import Batch
from oarsmith.models.decoder import Decoder

Decode = Callable[[list[int]], str]


def save_failure(
    output_dir: Path, step: int, reason: str, batches: Sequence[Batch], model: Decoder, decode: Decode
) -> Path:
    """Write ``failure-step-N/``: ``documents.jsonl`` (where, text, ids, weights) and ``report.json``; its path."""
    final = output_dir / f"failure-step-{step}"
    with atomic_directory(final) as folder:
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
        atomic_write_text(folder / "documents.jsonl", "\n".join(lines) + "\n")
        broken = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
        norms = {name: float(torch.linalg.vector_norm(p.detach().float())) for name, p in model.named_parameters()}
        report = {"step": step, "reason": reason, "parameters_not_finite": broken, "parameter_norms": norms}
        atomic_write_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
    return final
