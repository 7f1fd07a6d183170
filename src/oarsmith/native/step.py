"""The compiled step of a program: rows of tokens in, logits out. No PyTorch here."""

from __future__ import annotations

import ctypes
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import repeat

from oarsmith.errors import OarsmithError
from oarsmith.models.cache_form import CacheForm
from oarsmith.models.spec import PrefixLM
from oarsmith.native.arena import Arena
from oarsmith.native.bindings import bindings
from oarsmith.native.program import Program, Rotation
from oarsmith.native.sample import Row, Sampled, SampleRows
from oarsmith.native.structs import ProgramStructs, StepRows, StepSpec
from oarsmith.native.visibility import Part, Visibility

# Rows that go through the layers together: enough to reuse weights that are loaded, few enough for a core's cache.
MAX_ROWS = 512
_STORED = {"fp32": 0, "bf16": 1}


class Step:
    """Runs a program over a cache of its own.

    Args:
        threads: that work on a step together.
        num_sequences: rows of the cache; parts name theirs.
        page_size: tokens of a page, a multiple of 16.
        form: keep keys and values in 8 bits, in this way.

    Raises:
        OarsmithError: there is not enough memory.
        BuildError: the compiled library cannot be had.
    """

    def __init__(
        self,
        program: Program,
        arena: Arena,
        *,
        threads: int,
        num_pages: int,
        page_size: int,
        num_sequences: int,
        form: CacheForm | None = None,
    ) -> None:
        assert page_size % 16 == 0, page_size
        self.program = program
        self._arena = arena
        self._visibility = Visibility(program.facts.visibility)
        self._library = bindings()
        self._structs = ProgramStructs(program, arena.address)
        structs = self._structs
        spec = StepSpec(
            threads=threads,
            # Where the prompt sees all of itself, all of it goes together.
            max_rows=program.facts.max_positions if isinstance(program.facts.visibility, PrefixLM) else MAX_ROWS,
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
            cache_form=_form_code(form),
            cache_scales=_scales(program, form),
            num_pages=num_pages,
            page_size=page_size,
            num_states=len(program.states),
            num_slots=num_sequences,
            state_widths=structs.states,
        )
        self._handle = self._library.native_step_new(ctypes.byref(spec))
        if not self._handle:
            raise _out_of_memory()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.native_step_free(self._handle)

    def run(self, parts: Sequence[Part]) -> None:
        """Compute tokens of some sequences, each of which stands in one part.

        Raises:
            ModelError: a prompt that this kind of model cannot read.
        """
        look = self._visibility.look(parts)
        tokens, places, sequences = array("i"), array("i"), array("i")
        pages = []
        for index, part in enumerate(parts):
            count = len(part.tokens)
            tokens.extend(part.tokens)
            places.extend(range(part.start, part.start + count))
            sequences.extend(repeat(index, count))
            pages.append((ctypes.c_int32 * len(part.pages))(*part.pages))
        table = (ctypes.c_void_p * len(pages))(*map(ctypes.addressof, pages))
        slots = array("i", [part.row for part in parts])
        sets = array("i")
        for rotation in self.program.rotations:
            for part in parts:
                sets.extend(_sets(rotation, part))
        rows = StepRows(
            len(tokens),
            *map(_address, (tokens, places, sequences, look.positions, look.blocks, look.lows, look.highs)),
            ctypes.addressof(table),
            _address(slots),
        )
        if self._library.native_step_run(self._handle, ctypes.byref(rows), _address(sets)):
            raise _out_of_memory()

    def logits(self, places: Sequence[int], out: int) -> None:
        """Logits [places, vocabulary] in fp32, to the address ``out``, of rows of the last run."""
        wanted = array("q", places)
        if self._library.native_step_logits(self._handle, len(wanted), wanted.buffer_info()[0], out):
            raise _out_of_memory()

    def sample(self, logits: Sequence[int], rows: Sequence[Row]) -> list[Sampled]:
        """A token for each row. ``logits``: the address of each row's."""
        wanted = SampleRows(logits, rows, self.program.facts.vocab_size)
        if self._library.native_step_sample(self._handle, len(rows), ctypes.byref(wanted.structs)):
            raise _out_of_memory()
        return wanted.results()

    def copy_page(self, source: int, target: int) -> None:
        """Make a page hold what another holds."""
        self._library.native_step_copy_page(self._handle, source, target)

    def copy_sequence(self, source: int, target: int) -> None:
        """Let a row of the cache go on from where another is; pages are the caller's affair."""
        self._visibility.copy(source, target)
        self._library.native_step_copy_states(self._handle, source, target)


def _form_code(form: CacheForm | None) -> int:
    """As cpp/cache.h numbers them."""
    if form is None:
        return 0
    return 1 if form.in_groups else 2 if form.code == "int" else 3


def _scales(program: Program, form: CacheForm | None) -> ctypes.Array[ctypes.c_float] | None:
    """Layer by layer those of each head's keys, then of its values."""
    if form is None or form.scales is None:
        return None
    found: list[float] = []
    for (heads, _, _), (keys, values) in zip(program.cache, form.scales, strict=True):
        for own in (keys, values):
            assert len(own) in (1, heads), (len(own), heads)
            found += own if len(own) == heads else own * heads
    return (ctypes.c_float * len(found))(*found)


def _address(values: array[int]) -> int | None:
    return values.buffer_info()[0] if values else None


def _sets(rotation: Rotation, part: Part) -> Iterable[int]:
    if len(rotation.starts) == 1:
        return repeat(0, len(part.tokens))
    if rotation.follows == "prompt":
        return repeat(bisect_right(rotation.starts, part.prompt_size) - 1, len(part.tokens))
    ends = range(part.start + 1, part.start + len(part.tokens) + 1)
    return [bisect_right(rotation.starts, max(end, part.prompt_size)) - 1 for end in ends]


def _out_of_memory() -> OarsmithError:
    return OarsmithError("there is not enough memory for the native step", fix="lower num_pages or batch_size")
