"""A reference that follows the model: every so many steps the policy becomes it (TR-DPO, Gorbatovski et al. 2024, hard
updates).

There is never a second model: when the policy becomes the reference, it scores the answers of the steps up to the next
time. What is still needed of these numbers is part of the place in the data, so that a resumed run has them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from oarsmith.data.answers import AnswerBatch
from oarsmith.data.batch import Batch
from oarsmith.errors import ConfigError
from oarsmith.losses.answers import score_answers
from oarsmith.models.decoder import Decoder
from oarsmith.training.batches import BatchSource


class FollowedBatches:
    """Another source's batches of answers, with log-probabilities under a reference that follows the model.

    Up to the first update they have those that the rows came with. Iterating begins a step.

    Args:
        every: steps between two updates.
        accumulate: batches of a step; one that ends an epoch may have fewer.
        total: steps of the run.
    """

    def __init__(self, source: BatchSource, model: Decoder, *, every: int, accumulate: int, total: int) -> None:
        self._source, self._model = source, model
        self._every, self._accumulate, self._total = every, accumulate, total
        self._step = 0
        # Of each batch up to the next update; empty before the first.
        self._known: list[list[float]] = []

    def batches_per_epoch(self, epoch: int) -> int:
        return self._source.batches_per_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        if self._step > 0 and self._step % self._every == 0:
            self._known = self._look_ahead(min(self._every, self._total - self._step))
        self._step += 1
        for batch in self._source:
            if not self._known:
                yield batch
                continue
            assert isinstance(batch, AnswerBatch), type(batch)
            known = torch.tensor(self._known.pop(0), dtype=torch.float64)
            assert known.shape == batch.references_A.shape, (known.shape, batch.num_answers)
            yield replace(batch, references_A=known)

    @torch.no_grad()
    def _look_ahead(self, steps: int) -> list[list[float]]:
        """Log-probabilities of the answers of the next steps' batches, under the model as it is."""
        place, training = self._source.state(), self._model.training
        self._model.eval()
        found = []
        for _ in range(steps):
            for batch in itertools.islice(self._source, self._accumulate):
                assert isinstance(batch, AnswerBatch), type(batch)
                found.append(score_answers(self._model, batch).sums_A.tolist())
        self._model.train(training)
        self._source.load_state(place)
        return found

    def state(self) -> dict[str, Any]:
        """The other's place, the steps begun, and what is known of those up to the next update."""
        return {**self._source.state(), "reference_step": self._step, "references": list(self._known)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes to a saved place.

        Raises:
            ConfigError: the state is of a run whose reference did not follow.
        """
        if "references" not in state:
            what = "the checkpoint is of a run whose reference did not follow the model"
            raise ConfigError(what, where="ref_model_update_steps", fix="resume with -1, or start a new run")
        self._source.load_state(state)
        self._step, self._known = state["reference_step"], [list(of) for of in state["references"]]
