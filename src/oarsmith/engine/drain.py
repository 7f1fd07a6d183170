"""Answers to a list of prompts, as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from oarsmith.engine.desk import Desk
from oarsmith.engine.request import Completion
from oarsmith.engine.ticket import Ticket
from oarsmith.errors import OarsmithError


def drain(desk: Desk, tickets: Sequence[Ticket]) -> Iterator[tuple[int, Completion]]:
    """Open tickets; (index of one, its answer) as soon as it is finished. Those that are left behind are given up.

    Raises:
        OarsmithError: one of them has no answer; only after the others have theirs.
    """
    finished = deque[Ticket]()
    places = {ticket: index for index, ticket in enumerate(tickets)}
    failed: list[OarsmithError] = []
    num_left = len(tickets)
    try:
        for ticket in tickets:
            ticket.finished = finished.append
            desk.open(ticket)
        while num_left:
            desk.advance()
            while finished:
                ticket = finished.popleft()
                num_left -= 1
                if ticket.error is None:
                    yield places[ticket], desk.completion(ticket)
                else:
                    failed.append(ticket.error)
    finally:
        for ticket in tickets:
            desk.abort(ticket.id)
    if failed:
        raise failed[0]
