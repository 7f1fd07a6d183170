"""What must hold of an engine between any two steps."""

from __future__ import annotations

from collections import Counter

from oarsmith.engine import Completion, Engine


def account(engine: Engine) -> None:
    """Every page is free or in the table of a request that runs."""
    scheduler = engine.runner.scheduler
    pool = scheduler.pool
    held = Counter(page for request in scheduler.running for page in request.table.pages if page >= 0)
    assert pool._owners == [held[page] for page in range(pool.num_pages)]
    assert pool.num_free == pool.num_pages - len(held)
    rows = [request.row for request in scheduler.running]
    # A search keeps rows for beams that it does not have at the moment.
    rows += [row for beams in {request.beams for request in scheduler.running} if beams for row in beams.rows]
    assert sorted([*rows, *scheduler._rows]) == list(range(engine.batch_size))


def finish(engine: Engine) -> dict[str, Completion]:
    """Step until nothing is left; the answers by their ids."""
    found = {}
    while engine.busy:
        for output in engine.step():
            assert output.error is None
            if output.completion is not None:
                found[output.id] = output.completion
    account(engine)
    assert engine.runner.scheduler.pool.num_free == engine.runner.scheduler.pool.num_pages
    return found
