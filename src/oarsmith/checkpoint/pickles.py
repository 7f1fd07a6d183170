"""A pickle machine that computes nothing: it builds plain values and the records its caller allows.

Pickle is a program for a small stack machine, and the library's reader runs it: whatever the file names is imported and
called. Here the names a file may use are a table, everything else is an error, and long byte strings are not read but
remembered as ranges of the file, so that a file larger than memory can be opened. Opcodes: Python's Lib/pickletools.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from oarsmith.errors import CheckpointError

MAX_STEPS = 5_000_000  # a shard of the largest models takes a tenth of this; bounds time and memory
_MAX_TEXT = 1_000_000
_MAX_TEXTS = 100_000_000
_MAX_LINE = 4096
Call = Callable[[tuple[object, ...]], object]


@dataclass(frozen=True)
class FileBytes:
    """A byte string left in the file: absolute start and length."""

    start: int
    length: int


class Record:
    """Something an allowed call made, which the pickle may complete with a state."""

    def set_state(self, state: object) -> None:
        raise ValueError(f"{type(self).__name__} takes no state")


@dataclass(frozen=True)
class Vocabulary:
    """What a pickle may name: ``"module name"`` -> a call, or a value. ``persistent`` resolves persistent ids."""

    calls: Mapping[str, Call]
    values: Mapping[str, object]
    persistent: Callable[[object], object] | None = None


@dataclass(frozen=True)
class _Callable:
    name: str
    call: Call


class _Mark:
    """Separates the arguments of an opcode on the stack."""


_MARK = _Mark()


class PickleMachine:
    """Runs one pickle out of a file.

    Args:
        file: open for reading; the pickle starts at ``start`` and must end before ``end``.
        where: file name for messages.
        vocabulary: the names the pickle may use. Calls raise ValueError for arguments they do not take.
    """

    def __init__(self, file: BinaryIO, start: int, end: int, *, where: Path | str, vocabulary: Vocabulary) -> None:
        self.file, self.position, self.end = file, start, end
        self.where, self.vocabulary = str(where), vocabulary
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}
        self.texts = 0
        file.seek(start)

    def load(self) -> object:
        """The object; ``position`` is then the byte after the pickle.

        Raises:
            CheckpointError: the pickle names something outside of the vocabulary, is damaged, or is absurdly large.
        """
        try:
            for _ in range(MAX_STEPS):
                code = self.take(1)[0]
                if code == 0x2E:  # STOP
                    return self.pop()
                step = _STEPS.get(code)
                if step is None:
                    raise ValueError(f"opcode {code:#04x} is not known or not allowed")
                step(self)
        except (ValueError, IndexError, KeyError, TypeError, RecursionError, struct.error) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"damaged pickle near byte {self.position:,}: {error}", where=self.where, fix="copy the file again"
            ) from error
        raise CheckpointError(f"the pickle takes more than {MAX_STEPS:,} steps", where=self.where)

    def take(self, count: int) -> bytes:
        if count > self.end - self.position:
            raise ValueError(f"{count:,} bytes are promised, {self.end - self.position:,} are left")
        data = self.file.read(count)
        if len(data) != count:
            raise ValueError("the file ends early")
        self.position += count
        return data

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def line(self, encoding: str = "utf-8") -> str:
        data = self.file.readline(min(_MAX_LINE, self.end - self.position))
        if not data.endswith(b"\n"):
            raise ValueError("a line does not end")
        self.position += len(data)
        return data[:-1].decode(encoding)

    def text(self, size: int) -> str:
        length = self.number(size)
        self.texts += length
        if length > _MAX_TEXT or self.texts > _MAX_TEXTS:
            raise ValueError(f"a text of {length:,} bytes, {self.texts:,} in all")
        return self.take(length).decode("utf-8", "surrogatepass")

    def leave_bytes(self, size: int) -> FileBytes:
        length = self.number(size)
        if length > self.end - self.position:
            raise ValueError(f"{length:,} bytes are promised, {self.end - self.position:,} are left")
        found = FileBytes(self.position, length)
        self.position += length
        self.file.seek(self.position)
        return found

    def pop(self) -> object:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("the stack is empty")
        return value

    def pop_to_mark(self) -> list[object]:
        index = len(self.stack) - 1
        while self.stack[index] is not _MARK:
            index -= 1
            if index < 0:
                raise ValueError("no mark on the stack")
        values = self.stack[index + 1 :]
        del self.stack[index:]
        return values

    def find(self, module: object, name: object) -> object:
        key = f"{module} {name}"
        if key in self.vocabulary.calls:
            return _Callable(key, self.vocabulary.calls[key])
        if key in self.vocabulary.values:
            return self.vocabulary.values[key]
        raise CheckpointError(
            f"the pickle asks for {module}.{name}, which is not part of a checkpoint of weights; nothing was run",
            where=self.where,
            fix="do not use this file unless you trust its author; ask for safetensors",
        )

    def call(self, function: object, arguments: object) -> object:
        if not isinstance(function, _Callable) or not isinstance(arguments, tuple):
            raise ValueError("something that is no function is called")
        return function.call(arguments)

    def persistent(self, value: object) -> object:
        if self.vocabulary.persistent is None:
            raise ValueError("a persistent id where none belongs")
        return self.vocabulary.persistent(value)

    def put(self, index: int) -> None:
        value = self.stack[-1]
        if value is _MARK:
            raise ValueError("the stack is empty")
        self.memo[index] = value

    def extend_list(self, values: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise ValueError("something that is no list is extended")
        target.extend(values)

    def extend_dict(self, values: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(values) % 2:
            raise ValueError("something that is no dictionary is extended")
        for key, value in pairs(values).items():
            if key in target:
                raise ValueError(f"the key {str(key)[:100]!r} occurs twice")
            target[key] = value

    def build(self) -> None:
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, Record):
            target.set_state(state)
        elif not isinstance(target, dict):  # an OrderedDict's attributes (_metadata of a state dict) carry no weights
            raise ValueError(f"a {type(target).__name__} is given a state")


def pairs(values: list[object]) -> dict[object, object]:
    """Keys and values in turn. Keys are texts or numbers: hashing nested tuples can take forever."""
    found: dict[object, object] = {}
    for key, value in zip(values[::2], values[1::2], strict=True):
        if not isinstance(key, (str, int, type(None))):
            raise ValueError(f"a {type(key).__name__} is the key of a dictionary")
        if key in found:
            raise ValueError(f"the key {str(key)[:100]!r} occurs twice")
        found[key] = value
    return found


Step = Callable[[PickleMachine], object]


def _push(make: Callable[[PickleMachine], object]) -> Step:
    return lambda machine: machine.stack.append(make(machine))


def _global_lines(machine: PickleMachine) -> object:
    module = machine.line()
    return machine.find(module, machine.line())


def _stack_global(machine: PickleMachine) -> object:
    name, module = machine.pop(), machine.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise ValueError("a name that is no text")
    return machine.find(module, name)


def _reduce(machine: PickleMachine) -> object:
    arguments, function = machine.pop(), machine.pop()
    return machine.call(function, arguments)


def _last(machine: PickleMachine, count: int) -> tuple[object, ...]:
    return tuple(reversed([machine.pop() for _ in range(count)]))


def _line_int(machine: PickleMachine) -> object:
    text = machine.line()
    return {"00": False, "01": True}[text] if text in ("00", "01") else int(text.rstrip("L"))


def _signed(machine: PickleMachine, size: int) -> int:
    return int.from_bytes(machine.take(size), "little", signed=True)


_STEPS: dict[int, Step] = {
    ord("("): lambda m: m.stack.append(_MARK),
    ord("0"): lambda m: m.stack.pop(),
    ord("1"): lambda m: m.pop_to_mark(),
    ord("N"): _push(lambda m: None),
    0x88: _push(lambda m: True),
    0x89: _push(lambda m: False),
    ord("I"): _push(_line_int),
    ord("L"): _push(_line_int),
    ord("J"): _push(lambda m: _signed(m, 4)),
    ord("K"): _push(lambda m: m.number(1)),
    ord("M"): _push(lambda m: m.number(2)),
    0x8A: _push(lambda m: _signed(m, m.number(1))),
    ord("F"): _push(lambda m: float(m.line())),
    ord("G"): _push(lambda m: struct.unpack(">d", m.take(8))[0]),
    ord("V"): _push(lambda m: m.line("raw-unicode-escape")),
    ord("X"): _push(lambda m: m.text(4)),
    ord("U"): _push(lambda m: m.text(1)),
    ord("T"): _push(lambda m: m.text(4)),
    0x8C: _push(lambda m: m.text(1)),
    0x8D: _push(lambda m: m.text(8)),
    ord("C"): _push(lambda m: m.leave_bytes(1)),
    ord("B"): _push(lambda m: m.leave_bytes(4)),
    0x8E: _push(lambda m: m.leave_bytes(8)),
    0x96: _push(lambda m: m.leave_bytes(8)),
    ord("]"): _push(lambda m: []),
    ord("l"): _push(lambda m: m.pop_to_mark()),
    ord("a"): lambda m: m.extend_list([m.pop()]),
    ord("e"): lambda m: m.extend_list(m.pop_to_mark()),
    ord(")"): _push(lambda m: ()),
    ord("t"): _push(lambda m: tuple(m.pop_to_mark())),
    0x85: _push(lambda m: _last(m, 1)),
    0x86: _push(lambda m: _last(m, 2)),
    0x87: _push(lambda m: _last(m, 3)),
    ord("}"): _push(lambda m: {}),
    ord("d"): _push(lambda m: pairs(m.pop_to_mark())),
    ord("s"): lambda m: m.extend_dict(list(_last(m, 2))),
    ord("u"): lambda m: m.extend_dict(m.pop_to_mark()),
    ord("p"): lambda m: m.put(int(m.line())),
    ord("q"): lambda m: m.put(m.number(1)),
    ord("r"): lambda m: m.put(m.number(4)),
    0x94: lambda m: m.put(len(m.memo)),
    ord("g"): _push(lambda m: m.memo[int(m.line())]),
    ord("h"): _push(lambda m: m.memo[m.number(1)]),
    ord("j"): _push(lambda m: m.memo[m.number(4)]),
    ord("c"): _push(_global_lines),
    0x93: _push(_stack_global),
    ord("R"): _push(_reduce),
    0x81: _push(_reduce),
    ord("b"): lambda m: m.build(),
    ord("Q"): _push(lambda m: m.persistent(m.pop())),
    0x80: lambda m: m.number(1),  # PROTO
    0x95: lambda m: m.number(8),  # FRAME: a hint for buffering
}
