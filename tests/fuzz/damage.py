"""Files damaged in many ways, and readers that have to answer with an error of ours, in bounded time and memory."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from oarsmith.errors import OarsmithError

SECONDS = float(os.environ.get("OARSMITH_FUZZ_SECONDS", "0"))
EXAMPLES = 60
MAX_SECONDS = 10  # an example takes milliseconds; this is for a machine that is busy
MAX_BYTES = 1_000_000_000  # of address space beyond what the process has at the start


@dataclass(frozen=True)
class Reader:
    """A directory of valid files, the one that is damaged, and reading all of it."""

    folder: Path
    file: str
    read: Callable[[Path], object]


# Headers are at the start, the directory of a zip file is at the end.
PLACES = st.floats(0, 1, exclude_max=True) | st.floats(0, 0.02) | st.floats(0.97, 1, exclude_max=True)
NUMBERS = st.sampled_from(
    [0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**64 - 1]
)


@st.composite
def mutations(draw: st.DrawFn) -> list[tuple]:
    """A few changes: (what, where as a fraction of the file, argument)."""
    change = st.one_of(
        st.tuples(st.just("flip"), PLACES, st.integers(0, 7)),
        st.tuples(st.just("byte"), PLACES, st.integers(0, 255)),
        st.tuples(st.just("number"), PLACES, st.tuples(NUMBERS, st.sampled_from([1, 2, 4, 8]))),
        st.tuples(st.just("cut"), PLACES, st.just(None)),
        st.tuples(st.just("drop"), PLACES, st.integers(1, 64)),
        st.tuples(st.just("insert"), PLACES, st.binary(min_size=1, max_size=16)),
        st.tuples(st.just("splice"), PLACES, st.tuples(PLACES, st.integers(1, 128))),
        st.tuples(st.just("digit"), PLACES, st.sampled_from([b"-1", b"1e9", b"999999999999", b"null", b"[]", b'"x"'])),
    )
    return draw(st.lists(change, min_size=1, max_size=4))


def mutate(data: bytes, changes: list[tuple]) -> bytes:
    for what, place, argument in changes:
        at = int(place * len(data))
        match what:
            case "flip" if data:
                data = data[:at] + bytes([data[at] ^ (1 << argument)]) + data[at + 1 :]
            case "byte":
                data = data[:at] + bytes([argument]) + data[at + 1 :]
            case "number":
                number, size = argument
                data = data[:at] + (number % 2 ** (8 * size)).to_bytes(size, "little") + data[at + size :]
            case "cut":
                data = data[:at]
            case "drop":
                data = data[:at] + data[at + argument :]
            case "insert":
                data = data[:at] + argument + data[at:]
            case "splice":
                start = int(argument[0] * len(data))
                data = data[:at] + data[start : start + argument[1]] + data[at:]
            case "digit":
                found = next((i for i in range(at, len(data)) if data[i : i + 1].isdigit()), None)
                if found is not None:
                    end = next((i for i in range(found, len(data)) if not data[i : i + 1].isdigit()), len(data))
                    data = data[:found] + argument + data[end:]
    return data


class TooSlow(BaseException):
    """Not an Exception: nothing in between may swallow it."""


@contextmanager
def limits() -> Iterator[None]:
    """Address space bounds memory; an alarm bounds time."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"more than {MAX_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MAX_BYTES, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
    signal.signal(signal.SIGALRM, before)


def check(reader: Reader, changes: list[tuple], folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(reader.folder, folder)
    (folder / reader.file).write_bytes(mutate((reader.folder / reader.file).read_bytes(), changes))
    signal.alarm(MAX_SECONDS)
    try:
        reader.read(folder)
    except OarsmithError:
        pass
    finally:
        signal.alarm(0)


def fuzz(reader: Reader, folder: Path, share: float) -> None:
    """First the valid files, then damaged ones; ``share`` is that of the seconds to spend, if any are."""
    reader.read(shutil.copytree(reader.folder, folder / "valid"))
    deadline, rounds = time.monotonic() + SECONDS * share, 0
    while rounds == 0 or time.monotonic() < deadline:

        @seed(rounds)
        @settings(
            max_examples=EXAMPLES if SECONDS == 0 else 200,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(mutations())
        def run(changes: list[tuple]) -> None:
            check(reader, changes, folder / "damaged")

        run()
        rounds += 1
