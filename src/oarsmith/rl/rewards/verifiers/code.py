"""``code``: the program in the answer passes tests, or prints what it should."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from pydantic import Field

from oarsmith.rl.completion import Completion
from oarsmith.rl.rewards.options import RewardOptions
from oarsmith.rl.rewards.sandbox.sandbox import Case, Limits, Outcome, Sandbox
from oarsmith.rl.rewards.values import Reward, RewardError, Value, place
from oarsmith.rl.rewards.verifiers.answers import MAX_CHARACTERS
from oarsmith.rl.rewards.verifiers.verifier import column, texts_of
from oarsmith.rl.rewards.watch import Watch

_FENCE = re.compile(r"```(?:python3?|py)?[ \t]*\n(.*?)```", re.DOTALL)
_MIB = 1 << 20


class CodeOptions(RewardOptions):
    """Options of ``code``."""

    kind: Literal["tests", "stdin"] = Field(
        "tests",
        description="tests: statements such as `assert f(2) == 4` run in the program's names; stdin: the program reads "
        "an input and must print the right output. A program that cheats can only fake the first.",
    )
    column: str = Field(
        "tests",
        description="Column with a test or a list of them; of kind stdin: a list of {input, output}, or of [input, "
        "output].",
    )
    partial: bool = Field(False, description="The share of tests that pass; false: all of them or nothing.")
    fence: Literal["last", "none"] = Field(
        "last",
        description="last: the program is the last ``` fence (all of the answer if there is none); none: all of it.",
    )
    seconds: float = Field(5.0, gt=0, le=600, description="Wall time for each run.")
    memory_mib: int = Field(512, ge=64, description="Address space of each process, in MiB.")
    files_mib: int = Field(16, ge=1, description="What its files may hold together, in MiB, in memory.")
    processes: int = Field(8, ge=1, le=256, description="Processes and threads at a time.")
    output_kib: int = Field(1024, ge=1, description="What it may print, in KiB.")
    workers: int = Field(2, ge=1, description="Programs that run at a time.")
    readable: list[str] = Field(
        [], description="Absolute paths of directories that programs may read besides Python's."
    )
    allow_weaker: bool = Field(
        False,
        description="Where a whole sandbox is not allowed (containers without user namespaces), run programs with "
        "limits and without network, but not apart from this machine's files and processes.",
    )


class CodeReward(Reward):
    """Runs programs in a sandbox, several at a time.

    Raises:
        ConfigError: this machine does not allow the sandbox.
    """

    def __init__(self, options: CodeOptions) -> None:
        super().__init__(options.name or "code", waits=True)
        self._options = options
        limits = Limits(
            seconds=options.seconds,
            memory=options.memory_mib * _MIB,
            files=options.files_mib * _MIB,
            output=options.output_kib << 10,
            processes=options.processes,
        )
        self._sandbox = Sandbox(limits, readable=options.readable, allow_weaker=options.allow_weaker)
        self._sandbox.check()

    def values(self, batch: Sequence[Completion], watch: Watch) -> list[Value | RewardError]:
        def one(index: int) -> Value | RewardError:
            where = place(batch, index)
            with watch.waiting(f"reward '{self.name}': the program of {where}"):
                try:
                    return self._value(batch[index], where)
                except RewardError as error:
                    return error

        with ThreadPoolExecutor(self._options.workers, thread_name_prefix="oarsmith-code") as pool:
            return list(pool.map(one, range(len(batch))))

    def _value(self, one: Completion, where: str) -> Value:
        options = self._options
        given = column(one.row, options.column, reward=self.name, where=where)
        program = program_of(one.text) if options.fence == "last" else one.text
        if options.kind == "tests":
            tests = texts_of(given, options.column, reward=self.name, where=where)
            (outcome,) = self._sandbox.run(program, [Case(tests=tuple(tests))])
            passed = list(outcome.passed) or [False]
        else:
            pairs = self._pairs(given, where)
            outcomes = self._sandbox.run(program, [Case(stdin=stdin) for stdin, _ in pairs])
            passed = [_prints(outcome, wanted) for outcome, (_, wanted) in zip(outcomes, pairs, strict=True)]
        return sum(passed) / len(passed) if options.partial else float(all(passed))

    def _pairs(self, given: object, where: str) -> list[tuple[str, str]]:
        pairs: list[tuple[str, str]] = []
        for item in given if isinstance(given, list | tuple) else []:
            pair = [item.get("input", ""), item.get("output")] if isinstance(item, Mapping) else item
            if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(x, str) for x in pair):
                pairs = []
                break
            pairs.append((str(pair[0]), str(pair[1])))
        if not pairs:
            what = f"reward '{self.name}': the column '{self._options.column}' holds no list of input and output"
            raise RewardError(what, where=where, fix='write [{"input": "1 2", "output": "3"}, ...]')
        return pairs


def program_of(text: str) -> str:
    """The program in an answer: its last fenced block, or all of it."""
    text = text[-MAX_CHARACTERS:]
    found = _FENCE.findall(text)
    return str(found[-1]) if found else text


def _prints(outcome: Outcome, wanted: str) -> bool:
    """White space at ends of lines and of the output does not count."""
    if outcome.limit is not None or outcome.exit != 0:
        return False
    mine, theirs = ([line.rstrip() for line in text.rstrip().splitlines()] for text in (outcome.stdout, wanted))
    return mine == theirs
