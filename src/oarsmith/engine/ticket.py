"""A prompt in the engine: its answers on their way, and what is told of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from oarsmith.engine.choice import Choice
from oarsmith.engine.request import Completion, Request
from oarsmith.errors import OarsmithError


@dataclass(frozen=True)
class Output:
    """What a step brought for one answer.

    Attributes:
        id: of the request, as ``add`` returned it.
        index: which of the answers to its prompt.
        choice: the new token; None with an error, and for ``best_of`` and beams, where nothing is known before the end.
        text: what may be shown by now of what was not shown yet; "" where the engine has no tokenizer.
        completion: once all answers to the prompt are there: the first, with the others beside it.
        error: why there will be no completion.
    """

    id: str
    index: int
    choice: Choice | None
    text: str = ""
    completion: Completion | None = None
    error: OarsmithError | None = None


@dataclass(eq=False)
class Ticket:
    """One prompt.

    Args:
        requests: its answers; the first one reads the prompt.
        finished: called once all of them are done.
        told: whether somebody wants an output of every step.
    """

    id: str
    requests: list[Request]
    finished: Callable[[Ticket], None] | None = None
    told: bool = False

    @property
    def done(self) -> bool:
        return all(request.done for request in self.requests)

    @property
    def error(self) -> OarsmithError | None:
        """The first thing that went wrong."""
        return next((request.error for request in self.requests if request.error is not None), None)
