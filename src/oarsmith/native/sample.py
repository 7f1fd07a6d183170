"""The compiled sampler (cpp/sample.h). No PyTorch here."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from oarsmith.native.structs import SampleRow


@dataclass(frozen=True, kw_only=True)
class Row:
    """What decides about a row's token: the settings of engine/sampling.py, and what the request has come to.

    Attributes:
        uniform: a number in [0, 1); not looked at where the temperature is 0.
        allowed: for each token 0 where a constraint does not allow it; None: everything.
        seen, seen_counts: tokens that penalties look at, with how often each occurs.
        num_top: how many of the likeliest are wanted; None: not even the token's own probability.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    uniform: float = 0.0
    allowed: bytearray | None = None
    banned: array[int] = field(default_factory=lambda: array("q"))
    bias_ids: array[int] = field(default_factory=lambda: array("q"))
    bias: array[float] = field(default_factory=lambda: array("f"))
    seen: array[int] = field(default_factory=lambda: array("q"))
    seen_counts: array[float] = field(default_factory=lambda: array("f"))
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    num_top: int | None = None


@dataclass(frozen=True)
class Sampled:
    """A token; None: the logits are not numbers. Its log-probability and the likeliest ones, where they were wanted."""

    token: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class SampleRows:
    """Rows as the compiled sampler takes them."""

    def __init__(self, logits: Sequence[int], rows: Sequence[Row], size: int) -> None:
        """``logits``: the address of each row's."""
        self._rows = rows
        self._tops = [min(row.num_top or 0, size) for row in rows]
        self._ids = [(ctypes.c_int64 * top)() for top in self._tops]
        self._logprobs = [(ctypes.c_double * top)() for top in self._tops]
        self._masks = [None if row.allowed is None else _byte_address(row.allowed) for row in rows]
        self.structs = (SampleRow * len(rows))(*(self._struct(address, index) for index, address in enumerate(logits)))

    def _struct(self, logits: int, index: int) -> SampleRow:
        row, top = self._rows[index], self._tops[index]
        return SampleRow(
            logits=logits,
            temperature=row.temperature,
            top_k=row.top_k,
            top_p=row.top_p,
            min_p=row.min_p,
            typical_p=row.typical_p,
            uniform=row.uniform,
            allowed=self._masks[index],
            banned=_address(row.banned),
            bias_ids=_address(row.bias_ids),
            bias=_address(row.bias),
            seen=_address(row.seen),
            seen_counts=_address(row.seen_counts),
            num_banned=len(row.banned),
            num_bias=len(row.bias),
            num_seen=len(row.seen),
            repetition=row.repetition,
            frequency=row.frequency,
            presence=row.presence,
            num_top=-1 if row.num_top is None else top,
            top_ids=ctypes.addressof(self._ids[index]) if top else None,
            top_logprobs=ctypes.addressof(self._logprobs[index]) if top else None,
        )

    def results(self) -> list[Sampled]:
        """What was found."""
        found = []
        for index, struct in enumerate(self.structs):
            if struct.token < 0:
                found.append(Sampled(None))
                continue
            logprob = None if self._rows[index].num_top is None else struct.logprob
            top = tuple(zip(self._ids[index], self._logprobs[index], strict=True))
            found.append(Sampled(struct.token, logprob, top))
        return found


def _address(values: array) -> int | None:
    return values.buffer_info()[0] if values else None


def _byte_address(values: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(values))
