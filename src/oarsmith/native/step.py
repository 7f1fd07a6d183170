"""The compiled step of a program: rows of tokens in, logits out. No PyTorch here."""

from __future__ import annotations

import ctypes
from array import array
from bisect import bisect_right
from collections.abc import Sequence

from oarsmith.errors import OarsmithError
from oarsmith.native.arena import Arena
from oarsmith.native.bindings import bindings
from oarsmith.native.program import Program, Rotation
from oarsmith.native.structs import ProgramStructs, StepSpec

# Rows that go through the layers together: enough to reuse weights that are loaded, few enough for a core's cache.
MAX_ROWS = 512
_STORED = {"fp32": 0, "bf16": 1}


class Step:
    """Runs a program over a cache of its own.

    Args:
        threads: that work on a step together.
        page_size: tokens of a page, a multiple of 16.

    Raises:
        OarsmithError: there is not enough memory.
        BuildError: the compiled library cannot be had.
    """

    def __init__(self, program: Program, arena: Arena, *, threads: int, num_pages: int, page_size: int) -> None:
        assert page_size % 16 == 0, page_size
        self.program = program
        self._arena = arena
        self._library = bindings()
        self._structs = ProgramStructs(program, arena.address)
        structs = self._structs
        spec = StepSpec(
            threads=threads,
            max_rows=MAX_ROWS,
            num_buffers=len(program.widths),
            widths=structs.widths,
            stream=program.stream,
            head_input=program.head_input,
            logits=program.logits,
            num_body=len(program.body),
            num_head=len(program.head),
            body=structs.body,
            head=structs.head,
            num_rotations=len(program.rotations),
            rotations=structs.rotations,
            num_layers=len(program.cache),
            cache_dims=structs.cache_dims,
            stored=_STORED[program.stored],
            num_pages=num_pages,
            page_size=page_size,
        )
        self._handle = self._library.native_step_new(ctypes.byref(spec))
        if not self._handle:
            raise _out_of_memory()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.native_step_free(self._handle)

    def run(self, parts: Sequence[tuple[Sequence[int], int, Sequence[int], int]]) -> None:
        """Compute tokens of some sequences.

        Args:
            parts: of each (tokens, place of the first in the sequence, pages of the sequence, tokens of its prompt).
        """
        tokens, positions, sequences = array("i"), array("i"), array("i")
        pages = []
        for index, (ids, start, own, _) in enumerate(parts):
            tokens.extend(ids)
            positions.extend(range(start, start + len(ids)))
            sequences.extend([index] * len(ids))
            pages.append((ctypes.c_int32 * len(own))(*own))
        table = (ctypes.c_void_p * len(pages))(*(ctypes.addressof(own) for own in pages))
        sets = array("i")
        for rotation in self.program.rotations:
            for ids, start, _, prompt in parts:
                sets.extend(_sets(rotation, start, len(ids), prompt))
        address = [values.buffer_info()[0] for values in (tokens, positions, sequences)]
        if self._library.native_step_run(self._handle, len(tokens), *address, table, sets.buffer_info()[0]):
            raise _out_of_memory()

    def logits(self, places: Sequence[int], out: int) -> None:
        """Logits [places, vocabulary] in fp32, to the address ``out``, of rows of the last run."""
        wanted = array("q", places)
        if self._library.native_step_logits(self._handle, len(wanted), wanted.buffer_info()[0], out):
            raise _out_of_memory()

    def copy_page(self, source: int, target: int) -> None:
        """Make a page hold what another holds."""
        self._library.native_step_copy_page(self._handle, source, target)


def _sets(rotation: Rotation, start: int, count: int, prompt: int) -> list[int]:
    if len(rotation.starts) == 1:
        return [0] * count
    lengths = [prompt if rotation.follows == "prompt" else max(at + 1, prompt) for at in range(start, start + count)]
    return [bisect_right(rotation.starts, length) - 1 for length in lengths]


def _out_of_memory() -> OarsmithError:
    return OarsmithError("there is not enough memory for the native step", fix="lower num_pages or batch_size")
