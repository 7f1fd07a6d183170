"""A moving average of the weights, to evaluate and save in place of the last ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from oarsmith.errors import CheckpointError
from oarsmith.training.optimizers.base import Optimizer


class Ema:
    """average = decay * average + (1 - decay) * weight after each update (Polyak and Juditsky 1992).

    Averages are fp32 and follow the fp32 masters of the optimizer's parameters, in the memory the masters are in. They
    begin as the weights are now.
    """

    def __init__(self, optimizer: Optimizer, *, decay: float) -> None:
        assert 0 < decay < 1, decay
        self.decay = decay
        self._optimizer = optimizer
        self._averages = {name: optimizer.master(name).detach().clone() for name in optimizer.parameters}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an update."""
        for name, average in self._averages.items():
            average.lerp_(self._optimizer.master(name), 1 - self.decay)

    def state_tensors(self) -> dict[str, Tensor]:
        """Parameter name -> average, for a checkpoint."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_tensors` gave.

        Raises:
            CheckpointError: the averages are missing or belong to another model.
        """
        odd = sorted(self._averages.keys() ^ tensors.keys())
        if odd:
            raise CheckpointError(
                f"the averaged weights do not fit this model: {odd[0]}",
                fix="resume with the ema_decay and the model of the first run",
            )
        for name, average in self._averages.items():
            average.copy_(tensors[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the ``with`` block the parameters are the averages, rounded to their dtype; not for training."""
        parameters = self._optimizer.parameters
        before = {name: parameter.data.clone() for name, parameter in parameters.items()}
        try:
            # Into the memory that the model reads: a parameter here may be the local part of one of its own.
            for name, parameter in parameters.items():
                parameter.data.copy_(self._averages[name])
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data.copy_(before[name])
