"""Prompts that are not finished, and what there is to tell of them."""

from __future__ import annotations

from oarsmith.engine.intake import Intake
from oarsmith.engine.request import Completion, Request
from oarsmith.engine.runner import Runner
from oarsmith.engine.ticket import Output, Ticket
from oarsmith.errors import ConfigError


class Desk:
    """Open tickets by their ids, and outputs that nobody has taken yet.

    Attributes:
        runner: what computes; there once something is open.
    """

    def __init__(self, intake: Intake) -> None:
        self.runner: Runner | None = None
        self._tickets: dict[str, Ticket] = {}
        self._intake = intake
        self._ticket_of: dict[Request, Ticket] = {}
        self._outputs: list[Output] = []
        self._num_added = 0

    @property
    def busy(self) -> bool:
        """Whether anything is not finished, or was not taken yet."""
        return bool(self._tickets or self._outputs)

    def check(self, id: str | None) -> None:
        """Whether a ticket may have this name.

        Raises:
            ConfigError: one that is open has it.
        """
        if id in self._tickets:
            raise ConfigError(f"a request with the id {id} is not finished yet", where="id", fix="use another id")

    def is_open(self, id: str) -> bool:
        """Whether a ticket is not finished."""
        return id in self._tickets

    def open(self, ticket: Ticket, id: str | None = None, *, told: bool = False) -> str:
        """Give a ticket its name and its requests their places in the order, and let it wait; its name.

        Args:
            told: somebody wants an output of every step.
        """
        ticket.id = f"request {self._num_added}" if id is None else id
        ticket.told = told
        for request in ticket.requests:
            request.arrival = self._num_added
            self._num_added += 1
            self._ticket_of[request] = ticket
        self._tickets[ticket.id] = ticket
        assert self.runner is not None, id
        self.runner.scheduler.add(ticket.requests[0])
        return ticket.id

    def uses(self, adapter: str) -> bool:
        """Whether a ticket that is open goes through an adapter."""
        return any(ticket.requests[0].adapter == adapter for ticket in self._tickets.values())

    def abort(self, id: str) -> bool:
        """Forget a ticket, and what was to be told of it; False: it is not open."""
        ticket = self._tickets.pop(id, None)
        if ticket is None:
            return False
        for request in ticket.requests:
            del self._ticket_of[request]
            if not request.done and self.runner is not None:
                self.runner.scheduler.remove(request)
        self._outputs = [output for output in self._outputs if output.id != id]
        return True

    def step(self) -> list[Output]:
        """What is to be told; where there is nothing, a step is taken."""
        if not self._outputs:
            self.advance()
        outputs, self._outputs = self._outputs, []
        return outputs

    def advance(self) -> None:
        """One step for everybody: who is finished leaves, and what is to be told is noted."""
        stepped = [] if self.runner is None else self.runner.step()
        advanced = [(self._ticket_of[request], request) for request in stepped]
        for ticket, _ in advanced:
            if ticket.done and self._tickets.pop(ticket.id, None) is not None:
                for answer in ticket.requests:
                    del self._ticket_of[answer]
                if ticket.finished is not None:
                    ticket.finished(ticket)
        last = dict(advanced)
        for ticket, request in advanced:
            if ticket.told:
                self._tell(ticket, request, last[ticket] is request)

    def completion(self, ticket: Ticket) -> Completion:
        """The answers to a prompt that is done."""
        return self._intake.completion(ticket.requests)

    def _tell(self, ticket: Ticket, request: Request, last: bool) -> None:
        sampling = request.state.sampling
        # Of more answers than are wanted, nobody knows yet which will be given.
        shown = sampling.num_samples == sampling.n and sampling.num_beams == 1
        index = ticket.requests.index(request) if shown else 0
        if shown:
            # With guesses there may be several tokens; the text and what else there is to say come with the last.
            new = request.choices[request.num_told :]
            *earlier, choice = new if request.error is None else [*new, None]
            request.num_told = len(request.choices)
            self._outputs += [Output(ticket.id, index, token) for token in earlier]
        else:
            choice = None
        text = request.reader.take() if shown and request.reader is not None else ""
        completion = None
        if last and ticket.done and ticket.error is None:
            completion = self.completion(ticket)
        if shown or completion is not None or request.error is not None:
            self._outputs.append(Output(ticket.id, index, choice, text, completion, request.error))
