"""``oarsmith generate --input_file``: a line of output for each row, in the order of the rows.

However many rows there are, memory holds only those between the first that is not answered and the last that was begun.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from oarsmith.config.inference import GenerateConfig
from oarsmith.config.resolved import Resolved
from oarsmith.engine import Completion, Engine
from oarsmith.engine.choice import Choice
from oarsmith.errors import ConfigError, DataError, OarsmithError
from oarsmith.jobs.answer_settings import settings_of
from oarsmith.jobs.ask import is_raw
from oarsmith.jobs.kept_answers import KeptAnswers, keep_answers
from oarsmith.jobs.prompt_rows import InputRow, PromptRow, read_rows
from oarsmith.jobs.row_progress import RowProgress
from oarsmith.jobs.row_sampling import RowSampling

# Rows that may be answered before one that takes long: as many answers wait in memory, and are lost with the process.
MOST_AHEAD = 1024
_MOST_NAMED = 20

Encode = Callable[[PromptRow], list[int]]


def answer_file(
    resolved: Resolved[GenerateConfig], console: Console, open_engine: Callable[[], tuple[Engine, Encode]]
) -> None:
    """Answer the rows of ``input_file`` into ``output_file``. The rows are looked at before the model is loaded.

    Raises:
        OarsmithError: there is no row, or one that cannot be answered; answers of an interrupted command do not fit.
    """
    config, sampling = resolved.config, RowSampling(resolved)
    source, output = config.input_file or "", Path(config.output_file or "")
    if output.is_dir():
        raise ConfigError(f"{output} is a directory", where="output_file", fix="name a file, such as answers.jsonl")
    settings = settings_of(config, sampling.common)
    with keep_answers(output, settings, overwrite=config.overwrite_output_file) as kept:
        total, complete = _look_through(config, kept, sampling, console), False
        if kept.num_done:
            console.print(f"going on behind row {kept.num_done:,} of {total:,}: {kept.folder} has their answers")
        try:
            if kept.num_done < total:
                engine, encode = open_engine()
                with RowProgress(console, kept.num_done, total) as progress:
                    Answering(engine, encode, sampling, kept, progress, skip=config.on_malformed == "skip").run(
                        read_rows(source)
                    )
            complete = True
        finally:
            if kept.num_done and not complete:
                console.print(f"{kept.num_done:,} of {total:,} rows are answered; the same command goes on from there")
    errors = f", {kept.num_errors:,} of them errors" if kept.num_errors else ""
    console.print(f"{kept.num_done:,} answers in {output}{errors}", style="dim", soft_wrap=True)


def _look_through(config: GenerateConfig, kept: KeptAnswers, sampling: RowSampling, console: Console) -> int:
    """The number of rows. Those that are answered have not changed; the others ask something, or may be skipped."""
    source, total = config.input_file or "", 0
    first: OarsmithError | None = None
    num_bad = 0
    for number, row in enumerate(read_rows(source)):
        total += 1
        if number < kept.num_done:
            kept.check(number, row.digest, row.item.where)
        elif config.on_malformed == "error":
            try:
                _understood(config, row.prompt(), sampling)
            except OarsmithError as error:
                first = first or error
                num_bad += 1
                if num_bad <= _MOST_NAMED:
                    console.print(_line(error), markup=False, soft_wrap=True)
    if not total:
        raise DataError("the file has no rows", where=source, fix='write one {"prompt": "..."} a line')
    if total < kept.num_done:
        what = f"the file has {total:,} rows, and {kept.num_done:,} were answered"
        raise DataError(what, where=source, fix="bring the others back, or begin anew with --overwrite_output_file")
    if first is not None:
        left = f"; {num_bad - _MOST_NAMED:,} more" if num_bad > _MOST_NAMED else ""
        what = f"{num_bad:,} of {total:,} rows cannot be answered{left}" if num_bad > 1 else first.what
        fix = f"{first.fix or 'repair it'}; or put errors in place of answers with --on_malformed skip"
        raise DataError(what, where=source if num_bad > 1 else first.where, fix=fix)
    return total


def _understood(config: GenerateConfig, row: PromptRow, sampling: RowSampling) -> None:
    """Raises what is wrong with a row as far as that can be known without the model."""
    sampling.of(row, 0)
    if is_raw(config):
        _ = row.text


def _line(error: OarsmithError) -> str:
    return f"{error.where}: {error.what}" if error.where else error.what


class Answering:
    """Rows on their way through an engine.

    Args:
        encode: the ids of a row's prompt.
        kept: takes the answers, row after row.
        skip: a row that cannot be answered gets a line that says so; else its error ends the work.
    """

    def __init__(
        self,
        engine: Engine,
        encode: Encode,
        sampling: RowSampling,
        kept: KeptAnswers,
        progress: RowProgress,
        *,
        skip: bool,
    ) -> None:
        self._engine, self._encode, self._sampling = engine, encode, sampling
        self._kept, self._progress, self._skip = kept, progress, skip
        self._open: dict[str, tuple[int, str, PromptRow]] = {}
        self._finished: dict[int, tuple[str, dict[str, Any]]] = {}
        self._next = kept.num_done
        # As many again wait in the engine, so that there is always one that can begin.
        self._most_open = 2 * engine.batch_size

    def run(self, rows: Iterator[InputRow]) -> None:
        """Answer all rows behind those that are done.

        Raises:
            OarsmithError: the first row that cannot be answered, unless such rows are skipped.
        """
        unread, more = islice(rows, self._kept.num_done, None), True
        while more or self._open:
            while more and len(self._open) < self._most_open and self._next - self._kept.num_done < MOST_AHEAD:
                if more := (row := next(unread, None)) is not None:
                    self._begin(row)
            for output in self._engine.step():
                if output.error is not None and output.id in self._open:
                    self._engine.abort(output.id)
                    self._fail(*self._open.pop(output.id), output.error)
                elif output.completion is not None:
                    number, digest, prompt = self._open.pop(output.id)
                    self._finish(number, digest, answer(prompt, output.completion), tokens_of(output.completion))
            self._write()

    def _begin(self, row: InputRow) -> None:
        number, digest = self._next, row.digest
        self._next += 1
        prompt = None
        try:
            prompt = row.prompt()
            sampling, index = self._sampling.of(prompt, number)
            id = f"row {number + 1}"
            self._engine.add(self._encode(prompt), sampling, id=id, index=index)
        except OarsmithError as error:
            self._fail(number, digest, prompt, error)
        else:
            self._open[id] = number, digest, prompt

    def _fail(self, number: int, digest: str, row: PromptRow | None, error: OarsmithError) -> None:
        if row is not None:
            error = DataError(error.what, where=row.where, fix=error.fix)
        if not self._skip:
            raise error
        self._progress.message(_line(error))
        asked = {} if row is None else {"prompt": row.prompt}
        self._finish(number, digest, {"error": _line(error), **asked}, 0)

    def _finish(self, number: int, digest: str, line: dict[str, Any], num_tokens: int) -> None:
        self._finished[number] = digest, line
        self._progress.add(num_tokens)

    def _write(self) -> None:
        """What is finished, up to the first row that is not."""
        while (found := self._finished.pop(self._kept.num_done, None)) is not None:
            digest, line = found
            # Half a surrogate pair that JSON can spell has no UTF-8.
            self._kept.append(digest, json.dumps(line, ensure_ascii=False).encode("utf-8", "replace"))


def tokens_of(completion: Completion) -> int:
    """Tokens generated for a row."""
    return completion.num_tokens + sum(other.num_tokens for other in completion.others)


def answer(row: PromptRow, completion: Completion) -> dict[str, Any]:
    """A row's line of the output."""
    given: dict[str, Any] = {"prompt": row.prompt}
    if row.reference is not None:
        given["reference"] = row.reference
    found = {**given, **_output(completion), "num_prompt_tokens": completion.num_prompt_tokens}
    if completion.others:
        found["others"] = [_output(other) for other in completion.others]
    if completion.prompt_logprobs is not None:
        found["prompt_logprobs"] = _logprobs(completion.prompt_logprobs)
    return found


def _output(completion: Completion) -> dict[str, Any]:
    found: dict[str, Any] = {
        "output": completion.text,
        "finish_reason": completion.finish_reason,
        "num_tokens": completion.num_tokens,
    }
    if completion.score is not None:
        found["score"] = completion.score
    if completion.logprobs is not None:
        found["logprobs"] = _logprobs(completion.logprobs)
    return found


def _logprobs(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    return [{"token": choice.token, "logprob": choice.logprob, "top": choice.top} for choice in choices]
