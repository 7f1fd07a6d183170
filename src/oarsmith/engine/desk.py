"""Prompts that are not finished, and what there is to tell of them."""

from __future__ import annotations

from collections.abc import Sequence

from oarsmith.engine.intake import Intake
from oarsmith.engine.request import Request
from oarsmith.engine.ticket import Output, Ticket
from oarsmith.errors import ConfigError


class Desk:
    """Open tickets by their ids, and outputs that nobody has taken yet.

    Attributes:
        tickets: those that are not finished.
    """

    def __init__(self, intake: Intake) -> None:
        self.tickets: dict[str, Ticket] = {}
        self._intake = intake
        self._ticket_of: dict[Request, Ticket] = {}
        self._outputs: list[Output] = []
        self._num_added = 0

    @property
    def busy(self) -> bool:
        """Whether anything is not finished, or was not taken yet."""
        return bool(self.tickets or self._outputs)

    def check(self, id: str | None) -> None:
        """Whether a ticket may have this name.

        Raises:
            ConfigError: one that is open has it.
        """
        if id in self.tickets:
            raise ConfigError(f"a request with the id {id} is not finished yet", where="id", fix="use another id")

    def open(self, ticket: Ticket, id: str | None = None) -> None:
        """Give a ticket its name and its requests their places in the order."""
        ticket.id = f"request {self._num_added}" if id is None else id
        for request in ticket.requests:
            request.arrival = self._num_added
            self._num_added += 1
            self._ticket_of[request] = ticket
        self.tickets[ticket.id] = ticket

    def close(self, id: str) -> Ticket | None:
        """Forget a ticket, and what was to be told of it; None: it is not open."""
        ticket = self.tickets.pop(id, None)
        if ticket is not None:
            for request in ticket.requests:
                del self._ticket_of[request]
            self._outputs = [output for output in self._outputs if output.id != id]
        return ticket

    def settle(self, requests: Sequence[Request]) -> None:
        """A step went on with these: who is finished leaves, and what is to be told is noted."""
        advanced = [(self._ticket_of[request], request) for request in requests]
        for ticket, _ in advanced:
            if ticket.done and self.tickets.pop(ticket.id, None) is not None:
                for answer in ticket.requests:
                    del self._ticket_of[answer]
                if ticket.finished is not None:
                    ticket.finished(ticket)
        last = dict(advanced)
        for ticket, request in advanced:
            if ticket.told:
                self._tell(ticket, request, last[ticket] is request)

    def take(self) -> list[Output]:
        """What was noted since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs

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
            completion = self._intake.completion(ticket.requests)
        if shown or completion is not None or request.error is not None:
            self._outputs.append(Output(ticket.id, index, choice, text, completion, request.error))
