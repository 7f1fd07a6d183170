"""Which page of the cache holds which tokens: counts of owners, prefixes that are known, and what to give up first.

Bookkeeping alone; the tensors are in ``models/layout.py``.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

GONE = -1
"""In the place of a page that was given back because nothing sees it any more."""


@dataclass(eq=False)
class PageTable:
    """The pages of one sequence, in the order of its tokens.

    ``room``: the most pages it will need. ``keys``: what its first full pages hold, as far as that was told
    (``PagePool.remember``). ``num_gone``: pages at its beginning that were given back (``PagePool.trim``). ``hoped``:
    pages it hopes to grow into.
    """

    room: int
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    num_gone: int = 0
    hoped: range = range(0)

    @property
    def grows(self) -> bool:
        """Whether it will need more pages than it has."""
        return len(self.pages) < self.room


class PagePool:
    """``num_pages`` pages of ``block_size`` tokens.

    A page is empty, held by one or more tables, or idle: held by none, but what it holds is known and can be taken up
    again. Idle pages are emptied when they are needed, those first that have been idle for longest.
    """

    def __init__(self, num_pages: int, block_size: int) -> None:
        self.num_pages = num_pages
        self.block_size = block_size
        self._owners = [0] * num_pages
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._num_empty = num_pages
        # A byte a page, so that runs of free ones are found by a search for zeros: 1 where it is not empty; and 1
        # where it is not empty or a table hopes to grow into it.
        self._filled = bytearray(num_pages)
        self._claimed = bytearray(num_pages)

    @property
    def num_free(self) -> int:
        """Pages that can be had, idle ones among them."""
        return self._num_empty + len(self._idle)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def most_pages(self, num_tokens: int, window: int | None, step: int) -> int:
        """The most pages that a sequence of ``num_tokens`` holds at a time, ``step`` of which come at once."""
        whole = self.pages_for(num_tokens)
        # What comes, and what that sees; neither begins with a page.
        return whole if window is None else min(whole, self.pages_for(window + step) + 1)

    def open(self, num_tokens: int, ids: Sequence[int] = (), salt: bytes = b"", window: int | None = None) -> PageTable:
        """A table for a sequence of at most ``num_tokens``; it begins with pages known to hold the first of ``ids``.

        Args:
            salt: what beside the ids decides about keys and values.
            window: the most tokens that a token sees, itself included: what it cannot see need not be there.
        """
        table, keys = PageTable(self.pages_for(num_tokens)), self._keys(ids, salt, b"", 0)
        found = run = 0
        for count, key in enumerate(keys, start=1):
            run = run + 1 if key in self._page_of else 0
            if run >= count - self._num_unseen(count * self.block_size, window):
                found = count
            elif window is None:
                break
        table.num_gone = self._num_unseen(found * self.block_size, window)
        table.keys = keys[:found]
        table.pages = [GONE] * table.num_gone + [self._page_of[key] for key in keys[table.num_gone : found]]
        for page in table.pages[table.num_gone :]:
            self._hold(page)
        return table

    def trim(self, table: PageTable, num_tokens: int, window: int) -> None:
        """Give back the pages that no token after the first ``num_tokens`` sees."""
        unseen = self._num_unseen(num_tokens, window)
        for at in range(table.num_gone, unseen):
            self._drop(table.pages[at])
            table.pages[at] = GONE
        table.num_gone = max(table.num_gone, unseen)

    def _num_unseen(self, num_tokens: int, window: int | None) -> int:
        """Pages that hold nothing the next token sees."""
        return 0 if window is None else max(num_tokens - window + 1, 0) // self.block_size

    def fork(self, table: PageTable) -> PageTable:
        """Another table with the same pages."""
        for page in table.pages[table.num_gone :]:
            self._hold(page)
        return PageTable(table.room, list(table.pages), list(table.keys), table.num_gone)

    def grow(self, table: PageTable, start: int, stop: int) -> list[tuple[int, int]] | None:
        """Make tokens [start, stop) of a table writable.

        Returns:
            (source, target) of pages to be copied, because others hold the source too; None: too few pages are free,
            and nothing was changed.
        """
        first, last = start // self.block_size, self.pages_for(stop)
        assert first >= table.num_gone, (first, table.num_gone)
        shared = [at for at in range(first, min(last, len(table.pages))) if self._owners[table.pages[at]] > 1]
        if len(shared) + max(last - len(table.pages), 0) > self.num_free:
            return None
        copies = []
        for at in shared:
            old = table.pages[at]
            table.pages[at] = self._take(table, at)
            copies.append((old, table.pages[at]))
            self._drop(old)
        while len(table.pages) < last:
            table.pages.append(self._take(table, len(table.pages)))
        return copies

    def remember(self, table: PageTable, ids: Sequence[int], salt: bytes = b"") -> None:
        """Say that the table's pages hold the keys of ``ids``: whole pages can then be found by ``open``."""
        known = len(table.keys)
        for key in self._keys(ids, salt, table.keys[-1] if known else b"", known):
            page = table.pages[len(table.keys)]
            table.keys.append(key)
            if key not in self._page_of and page not in self._key_of:
                self._page_of[key], self._key_of[page] = page, key

    def close(self, table: PageTable, *, forget: bool = False) -> None:
        """Give its pages back; ``forget``: what they hold is not to be found any more."""
        for page in table.hoped:
            self._claimed[page] = self._filled[page]
        # The last pages become idle first, and are given up first: without its beginning a prefix is of no use.
        for page in reversed(table.pages[table.num_gone :]):
            if forget and page in self._key_of:
                del self._page_of[self._key_of.pop(page)]
            self._drop(page)
        table.pages.clear()
        table.keys.clear()
        table.num_gone = 0
        table.hoped = range(0)

    def num_freed(self, tables: Sequence[PageTable]) -> int:
        """Pages that could be had if these tables gave theirs back."""
        held = Counter(page for table in tables for page in table.pages[table.num_gone :])
        return sum(self._owners[page] == count for page, count in held.items())

    def forget(self) -> None:
        """Empty all idle pages, and let nothing that is held be found."""
        for page in self._idle:
            self._empty(page)
        self._idle.clear()
        self._key_of.clear()
        self._page_of.clear()

    def _keys(self, ids: Sequence[int], salt: bytes, parent: bytes, known: int) -> list[bytes]:
        """Names of the full pages of ``ids`` after the first ``known``: each follows from all tokens up to its end."""
        keys, size = [], self.block_size
        for start in range(known * size, len(ids) - size + 1, size):
            content = array("q", ids[start : start + size]).tobytes()
            parent = hashlib.blake2b(
                content, digest_size=16, key=parent, salt=b"" if parent else _digest(salt)
            ).digest()
            keys.append(parent)
        return keys

    def _hold(self, page: int) -> None:
        self._owners[page] += 1
        self._idle.pop(page, None)

    def _drop(self, page: int) -> None:
        self._owners[page] -= 1
        assert self._owners[page] >= 0, page
        if self._owners[page] == 0:
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._empty(page)

    def _empty(self, page: int) -> None:
        self._filled[page] = self._claimed[page] = 0
        self._num_empty += 1

    def _take(self, table: PageTable, at: int) -> int:
        """An empty page for place ``at`` of a table: side by side with the one before where that is possible."""
        page = self._choose(table, at)
        self._num_empty -= 1
        self._filled[page] = self._claimed[page] = 1
        self._owners[page] = 1
        return page

    def _choose(self, table: PageTable, at: int) -> int:
        after = table.pages[at - 1] + 1 if at else -1
        if after in table.hoped and not self._filled[after]:
            return after
        if 0 <= after < self.num_pages and not self._claimed[after]:
            return after
        wanted = max(table.room - at, 1)
        start = self._claimed.find(bytes(wanted))
        for _ in range(min(wanted, len(self._idle))):
            if start >= 0:
                break
            # One after another what one sequence left lies side by side again.
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
            self._empty(page)
            start = self._claimed.find(bytes(wanted))
        while start < 0 and wanted > 1:
            wanted //= 2
            start = self._claimed.find(bytes(wanted))
        if start < 0:
            return self._filled.find(0)
        self._hope(table, range(start, start + wanted))
        return start

    def _hope(self, table: PageTable, pages: range) -> None:
        for page in table.hoped:
            self._claimed[page] = self._filled[page]
        table.hoped = pages
        self._claimed[pages.start : pages.stop] = b"\1" * len(pages)


def _digest(salt: bytes) -> bytes:
    return hashlib.blake2b(salt, digest_size=hashlib.blake2b.SALT_SIZE).digest() if salt else b""
