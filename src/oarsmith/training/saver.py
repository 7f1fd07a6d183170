"""Writing checkpoints while training waits, or in the background from a copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oarsmith.models.decoder import Decoder
from oarsmith.training.checkpoint import CheckpointStore


@dataclass(kw_only=True)
class Saver:
    """Saves to ``store`` and prunes it. One checkpoint is written at a time.

    Attributes:
        write_model: writes the weights of the given model into a directory.
        background: copy weights and states, and write the copy in a thread while training goes on. That takes the
            memory of one more copy of what trains.
    """

    store: CheckpointStore
    write_model: Callable[[Decoder, Path], None]
    background: bool = False
    _worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "save"), init=False)
    _writing: Future[None] | None = field(default=None, init=False)

    def save(
        self, step: int, model: Decoder, tensors: Mapping[str, Tensor], state: Mapping[str, Any], best: int | None
    ) -> None:
        """Write ``checkpoint-{step}``, at once or soon.

        Raises:
            OSError, OarsmithError: this save failed, or the one before it that was still being written.
        """
        self.finish()
        if not self.background:
            self._write(step, model, tensors, state, best)
            return
        twin, kept = _copy_of(model), {name: tensor.clone() for name, tensor in tensors.items()}
        self._writing = self._worker.submit(self._write, step, twin, kept, copy.deepcopy(state), best)

    def finish(self) -> None:
        """Wait until nothing is being written.

        Raises:
            OSError, OarsmithError: what went wrong in the background.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(
        self, step: int, model: Decoder, tensors: Mapping[str, Tensor], state: Mapping[str, Any], best: int | None
    ) -> None:
        self.store.save(step, lambda folder: self.write_model(model, folder), tensors, state)
        self.store.prune(best)


def _copy_of(model: Decoder) -> Decoder:
    """A model whose trained parameters stay as they are now; what is frozen is shared."""
    shared: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    for parameter in model.parameters():
        assert parameter.grad is None or not parameter.requires_grad, "gradients are freed before a save"
    with torch.no_grad():
        return copy.deepcopy(model, shared)
