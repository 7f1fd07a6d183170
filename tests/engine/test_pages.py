"""Pages: nothing leaks, nothing is written that somebody else holds, what is found holds what it says."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from oarsmith.engine.pages import GONE, PagePool, PageTable

SIZE = 4
WINDOW = 6


class Model:
    """A sequence, and what a cache would hold of it."""

    def __init__(self, table: PageTable, ids: list[int], salt: bytes) -> None:
        self.table, self.ids, self.salt = table, ids, salt


class Pages(RuleBasedStateMachine):
    """Random sequences over few ids; ``content`` is what a real cache would hold."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(12, SIZE)
        self.content: list[list[object]] = [[None] * SIZE for _ in range(12)]
        self.open: list[Model] = []

    def write(self, model: Model, ids: list[int]) -> bool:
        start, stop = len(model.ids), len(model.ids) + len(ids)
        before, free = list(model.table.pages), self.pool.num_free
        copies = self.pool.grow(model.table, start, stop)
        if copies is None:
            assert model.table.pages == before and self.pool.num_free == free
            return False
        for source, target in copies:
            self.content[target] = list(self.content[source])
        for index in range(start, stop):
            page = model.table.pages[index // SIZE]
            others = [other for other in self.open if other is not model and page in other.table.pages]
            assert not others, "a page is written that another sequence holds"
            model.ids.append(ids[index - start])
            self.content[page][index % SIZE] = (model.salt, tuple(model.ids))
        self.pool.remember(model.table, model.ids, model.salt)
        return True

    @rule(
        target=sequences,
        ids=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        room=st.integers(0, 20),
        salt=st.sampled_from([b"", b"adapter"]),
    )
    def begin(self, ids: list[int], room: int, salt: bytes) -> Model:
        table = self.pool.open(len(ids) + room, ids[:-1], salt)
        known = len(table.pages) * SIZE
        assert known < len(ids)
        model = Model(table, ids[:known], salt)
        self.open.append(model)
        self.write(model, ids[known:])
        return model

    @rule(model=sequences, ids=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def extend(self, model: Model, ids: list[int]) -> None:
        self.write(model, ids)

    @rule(target=sequences, model=sequences)
    def fork(self, model: Model) -> Model:
        other = Model(self.pool.fork(model.table), list(model.ids), model.salt)
        self.open.append(other)
        return other

    @rule(model=consumes(sequences), forget=st.booleans())
    def end(self, model: Model, forget: bool) -> None:
        self.open.remove(model)
        self.pool.close(model.table, forget=forget)

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        assert not self.pool.open(8, [0] * 8).pages

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        held = Counter(page for model in self.open for page in model.table.pages)
        assert self.pool._owners == [held[page] for page in range(12)]
        assert self.pool.num_free == 12 - len(held)
        assert not set(self.pool._idle) & set(held)
        assert sum(self.pool._filled) == len(held) + len(self.pool._idle)
        assert self.pool._key_of == {page: key for key, page in self.pool._page_of.items()}

    @invariant()
    def every_sequence_finds_its_own_tokens(self) -> None:
        for model in self.open:
            assert len(set(model.table.pages)) == len(model.table.pages)
            for index in range(len(model.ids)):
                held = self.content[model.table.pages[index // SIZE]][index % SIZE]
                assert held == (model.salt, tuple(model.ids[: index + 1]))


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def filled(pool: PagePool, ids: list[int], room: int = 0) -> PageTable:
    table = pool.open(len(ids) + room, ids)
    assert pool.grow(table, 0, len(ids)) == []
    pool.remember(table, ids)
    return table


def test_sequences_grow_side_by_side() -> None:
    """Three that grow in turns get a run each, as long as they may become."""
    pool = PagePool(12, SIZE)
    tables = [pool.open(16) for _ in range(3)]
    for stop in range(1, 17):
        for table in tables:
            assert pool.grow(table, stop - 1, stop) == []
    assert [table.pages for table in tables] == [list(range(at, at + 4)) for at in (0, 4, 8)]
    assert pool.grow(pool.open(1), 0, 1) is None


def test_what_was_given_up_lies_side_by_side() -> None:
    """A pool that has long been full of known prefixes."""
    pool = PagePool(12, SIZE)
    for number in range(20):
        table = filled(pool, [number] * 16, room=0)
        assert table.pages == list(range(table.pages[0], table.pages[0] + 4))
        pool.close(table)
    assert pool.num_free == 12 and len(pool.open(16, [19] * 16).pages) == 4


def test_the_longest_idle_page_goes_first() -> None:
    pool = PagePool(4, SIZE)
    old, new = filled(pool, [1] * 8), filled(pool, [2] * 8)
    pool.close(old)
    pool.close(new)
    other = filled(pool, [3] * 4)
    assert len(pool.open(8, [1] * 8).pages) == 1, "its end was given up"
    assert len(pool.open(8, [2] * 8).pages) == 2
    assert other.pages and pool.num_free == 0


@pytest.mark.parametrize("ids", [[1] * 8, [1] * 7, [2, 1, 1, 1, 1, 1, 1, 1]])
def test_a_prefix_is_all_tokens_up_to_its_end(ids: list[int]) -> None:
    """Equal tokens after other ones are another prefix, and so are equal tokens of another adapter."""
    pool = PagePool(9, SIZE)
    filled(pool, [1] * 12)
    known = 0
    while (known + 1) * SIZE <= len(ids) and ids[: (known + 1) * SIZE] == [1] * ((known + 1) * SIZE):
        known += 1
    assert len(pool.open(len(ids), ids).pages) == known
    assert not pool.open(len(ids), ids, b"adapter").pages


class Windows(RuleBasedStateMachine):
    """Sequences whose tokens see the last few alone; ``content`` is what a real cache would hold."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(10, SIZE)
        self.content: list[list[object]] = [[None] * SIZE for _ in range(10)]
        self.open: list[Model] = []

    @rule(target=sequences, ids=st.lists(st.integers(0, 1), min_size=1, max_size=30))
    def begin(self, ids: list[int]) -> Model:
        table = self.pool.open(len(ids), ids[:-1], window=WINDOW)
        model = Model(table, ids[: len(table.pages) * SIZE], b"")
        self.open.append(model)
        return model

    @rule(model=sequences, ids=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def extend(self, model: Model, ids: list[int]) -> None:
        start, stop = len(model.ids), len(model.ids) + len(ids)
        copies = self.pool.grow(model.table, start, stop)
        if copies is None:
            return
        for source, target in copies:
            self.content[target] = list(self.content[source])
        for index in range(start, stop):
            model.ids.append(ids[index - start])
            self.content[model.table.pages[index // SIZE]][index % SIZE] = tuple(model.ids)
        self.pool.remember(model.table, model.ids)
        self.pool.trim(model.table, stop, WINDOW)
        assert len(model.table.pages) - model.table.num_gone <= 1 + -(-(WINDOW - 1) // SIZE)

    @rule(target=sequences, model=sequences)
    def fork(self, model: Model) -> Model:
        other = Model(self.pool.fork(model.table), list(model.ids), b"")
        self.open.append(other)
        return other

    @rule(model=consumes(sequences))
    def end(self, model: Model) -> None:
        self.open.remove(model)
        self.pool.close(model.table)

    @invariant()
    def what_is_seen_is_there(self) -> None:
        held = Counter(page for model in self.open for page in model.table.pages if page != GONE)
        assert self.pool._owners == [held[page] for page in range(10)]
        assert self.pool.num_free == 10 - len(held)
        for model in self.open:
            for index in range(max(len(model.ids) - WINDOW + 1, 0), len(model.ids)):
                page = model.table.pages[index // SIZE]
                assert self.content[page][index % SIZE] == tuple(model.ids[: index + 1])


TestWindows = Windows.TestCase
TestWindows.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_the_beginning_may_be_gone() -> None:
    """Where nobody sees it, a prefix is found without it."""
    pool, ids = PagePool(6, SIZE), list(range(20))
    table = pool.open(20)
    for start in range(0, 20, SIZE):
        assert pool.grow(table, start, start + SIZE) == []
        pool.remember(table, ids[: start + SIZE])
        pool.trim(table, start + SIZE, WINDOW)
    assert table.pages[:3] == [GONE] * 3 and table.num_gone == 3
    pool.close(table)
    other = pool.open(12)
    assert pool.grow(other, 0, 12) == [], "takes what was idle for longest"
    again = pool.open(24, [*ids, 1], window=WINDOW)
    assert again.pages[:3] == [GONE] * 3 and len(again.pages) == 5
    assert pool.open(24, [*ids, 1]).pages == []


def test_what_tables_would_free() -> None:
    pool = PagePool(6, SIZE)
    one = filled(pool, [1] * 12)
    two, other = pool.fork(one), filled(pool, [2] * 8)
    assert [pool.num_freed(tables) for tables in ([one], [one, two], [other], [one, two, other])] == [0, 3, 2, 5]
