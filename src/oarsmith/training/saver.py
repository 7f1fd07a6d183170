"""Writing checkpoints while training waits, or in the background from a copy."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
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
    _thread: threading.Thread | None = field(default=None, init=False)
    _error: BaseException | None = field(default=None, init=False)

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
        self._thread = threading.Thread(
            target=self._try_to_write, args=(step, twin, kept, copy.deepcopy(state), best), name=f"save-{step}"
        )
        self._thread.start()

    def finish(self) -> None:
        """Wait until nothing is being written.

        Raises:
            OSError, OarsmithError: what went wrong in the background.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _try_to_write(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except BaseException as error:  # noqa: BLE001 - a thread cannot raise; finish() does
            self._error = error

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
