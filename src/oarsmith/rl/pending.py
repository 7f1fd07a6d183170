"""A rollout that is made while another one is learned from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from oarsmith.rl.completion import Scores
from oarsmith.rl.experience import Scored
from oarsmith.rl.prompts import Asked
from oarsmith.rl.rollout import Written

KEY = "pending"


class Pending:
    """At most one rollout on its way, in a thread of its own."""

    def __init__(self) -> None:
        self._worker: ThreadPoolExecutor | None = None
        self._future: Future[Scored] | None = None
        self._ready: Scored | None = None

    @property
    def there(self) -> bool:
        """Whether one was begun, or is ready."""
        return self._future is not None or self._ready is not None

    def begin(self, make: Callable[[], Scored]) -> None:
        """Let one be made."""
        assert not self.there
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "rollout")
        self._future = self._worker.submit(make)

    def put(self, scored: Scored) -> None:
        """One that a checkpoint held."""
        assert not self.there
        self._ready = scored

    def look(self) -> Scored | None:
        """The one that was begun, as soon as it is ready; it stays. What went wrong with it is raised."""
        if self._future is not None:
            self._ready, self._future = self._future.result(), None
        return self._ready

    def take(self) -> Scored:
        """As ``look``; the next one may begin."""
        found = self.look()
        assert found is not None
        self._ready = None
        return found


def scored_to_tensor(scored: Scored) -> Tensor:
    """All of a rollout as bytes; its prompts by their numbers."""
    found = {
        "numbers": scored.numbers,
        "groups": [[asdict(written) for written in group] for group in scored.groups],
        "total": scored.scores.total,
        "parts": scored.scores.parts,
        "baselines": scored.baselines,
        "drawn": scored.drawn,
        "version": scored.version,
    }
    return torch.frombuffer(bytearray(json.dumps(found).encode()), dtype=torch.uint8)


def scored_from_tensor(tensor: Tensor, prompt: Callable[[int], Asked]) -> Scored:
    """What ``scored_to_tensor`` made."""
    found: Mapping[str, Any] = json.loads(tensor.numpy().tobytes())
    return Scored(
        prompts=tuple(prompt(number) for number in found["numbers"]),
        groups=tuple(tuple(Written(**written) for written in group) for group in found["groups"]),
        scores=Scores(total=found["total"], parts=found["parts"]),
        baselines=tuple(found["baselines"]),
        drawn=found["drawn"],
        version=found["version"],
        numbers=tuple(found["numbers"]),
    )
