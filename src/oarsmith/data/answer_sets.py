"""From a source of preference data to prompts with answers in memory, with the account of every row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from oarsmith.data.answer_samples import AnswerEncoder, AnswerOptions, EncodedAnswers
from oarsmith.data.answers import Answered
from oarsmith.data.dataset import PROGRESS_EVERY, Progress
from oarsmith.data.judged import Judged, Kind, pointwise, with_mismatched
from oarsmith.data.preferences import read_answered, read_judged
from oarsmith.data.records import ReadLog, read_records
from oarsmith.data.report import DataReport
from oarsmith.data.rows import fingerprint_of
from oarsmith.errors import DataError

if TYPE_CHECKING:
    from oarsmith.text import Tokenizer

PAIRS_SPLIT = "pairs taken as two rows of one answer"

_KINDS: dict[Kind, str] = {
    "pair": "a pair of answers",
    "point": "one answer with a label",
    "steps": "one answer judged step by step",
}
_JOBS: dict[Kind, str] = {
    "pair": "oarsmith dpo and oarsmith reward",
    "point": "oarsmith kto",
    "steps": "oarsmith reward with process_reward true",
}


@dataclass(frozen=True, slots=True)
class AnswerSet:
    """Rows in the order of the data, the report, and the sha256 over the rows."""

    rows: tuple[Answered, ...]
    report: DataReport
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows)


def judged_rows(source: str | Path, options: AnswerOptions, report: DataReport) -> Iterator[Judged]:
    """Each readable row as what ``options.kind`` wants, counted in `report`.

    Raises:
        DataError: a malformed row, or one that is no judgement, unless options.on_malformed is "skip"; with file:line.
    """
    log = ReadLog()
    for record in read_records(source, options.split, log=log, on_malformed=options.on_malformed):
        report.rows += 1
        try:
            judged = read_answered(record) if options.unjudged else read_judged(record)
            if options.kind == "point" and judged.kind == "pair":
                report.rows += 1
                report.notes[PAIRS_SPLIT] += 1
                yield from pointwise(judged)
                continue
            if options.kind not in (None, judged.kind):
                what = f"the row has {_KINDS[judged.kind]}, expected {_KINDS[options.kind]}"
                raise DataError(what, where=record.where, fix=f"such rows are for {_JOBS[judged.kind]}")
        except DataError as error:
            if options.on_malformed == "error":
                raise
            report.malformed.add(str(error).partition("\n")[0])
            continue
        yield judged
    report.blank = log.blank
    for left_out in log.malformed:
        report.rows += 1
        report.malformed.add(str(left_out).partition("\n")[0])


def encode_answers(
    source: str | Path, tokenizer: Tokenizer, options: AnswerOptions, report: DataReport
) -> Iterator[tuple[Judged, EncodedAnswers]]:
    """Each row with its ids, counted in `report` as they pass.

    Raises:
        DataError: as `judged_rows`; also where options.mismatched finds no other prompt.
    """
    encoder = AnswerEncoder(tokenizer, options)
    rows: Iterable[Judged] = judged_rows(source, options, report)
    if options.mismatched:
        rows = with_mismatched(list(rows))
    for judged in rows:
        encoded = encoder.encode(judged)
        if encoded.row is not None:
            report.keep([encoded.row], encoded.notes)
        else:
            assert encoded.dropped is not None, judged.where
            report.drop(encoded.dropped.reason, judged.where, encoded.dropped.detail)
        yield judged, encoded


def build_answers(
    source: str | Path, tokenizer: Tokenizer, options: AnswerOptions, progress: Progress | None = None
) -> AnswerSet:
    """Reads, encodes and accounts for a whole data source.

    Raises:
        DataError: as `encode_answers`; also where nothing would be trained or more than options.max_dropped_fraction of
            the rows were left out.
    """
    report = DataReport(str(source), options.max_length)
    rows: list[Answered] = []
    done = 0
    for _, encoded in encode_answers(source, tokenizer, options, report):
        if encoded.row is not None:
            rows.append(encoded.row)
        done += 1
        if progress is not None and done % PROGRESS_EVERY == 0:
            progress(done, None, "encoding rows")
    report.finish([row.size(share=options.share) for row in rows])
    if progress is not None:
        progress(done, done, "encoding rows")
    report.check(options.max_dropped_fraction)
    return AnswerSet(tuple(rows), report, fingerprint_of(rows))
