"""From a data source to samples in memory, with the account of every row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from oarsmith.data.conversations import to_conversation
from oarsmith.data.records import ReadLog, Record, read_records
from oarsmith.data.report import DataReport
from oarsmith.data.rows import fingerprint_of
from oarsmith.data.samples import ConversationEncoder, Encoded, Sample, SampleOptions
from oarsmith.errors import DataError

if TYPE_CHECKING:
    from oarsmith.text import Tokenizer

Progress = Callable[[int, int | None, str], None]
"""progress(done, total or None where unknown, what is being done)."""

PROGRESS_EVERY = 100


@dataclass(frozen=True, slots=True)
class SampleSet:
    """Samples in the order of their rows, the report, and the sha256 over ids and weights."""

    samples: tuple[Sample, ...]
    report: DataReport
    fingerprint: str

    def __len__(self) -> int:
        return len(self.samples)


def encode_rows(
    source: str | Path, tokenizer: Tokenizer, options: SampleOptions, report: DataReport
) -> Iterator[tuple[Record, Encoded]]:
    """Each readable row with its samples, counted in `report` as they pass.

    Raises:
        DataError: a malformed row (unless options.on_malformed is "skip"), or a row without trained tokens where
            options.on_empty is "error"; with file:line.
    """
    log = ReadLog()
    encoder = ConversationEncoder(tokenizer, options)
    for record in read_records(source, options.split, log=log, on_malformed=options.on_malformed):
        report.rows += 1
        try:
            encoded = encoder.encode(to_conversation(record, options.dataset_format))
        except DataError as error:
            if options.on_malformed == "error":
                raise
            report.malformed.add(str(error).partition("\n")[0])
            continue
        if encoded.dropped is None:
            report.keep(encoded.samples, encoded.notes)
        elif options.on_empty == "error":
            detail = f": {encoded.dropped.detail}" if encoded.dropped.detail else ""
            raise DataError(
                f"the row has no trained token ({encoded.dropped.reason}{detail})",
                where=record.where,
                fix='repair or remove the row, or leave such rows out with on_empty "drop"',
            )
        else:
            report.drop(encoded.dropped.reason, record.where, encoded.dropped.detail)
        yield record, encoded
    report.blank = log.blank
    for left_out in log.malformed:
        report.rows += 1
        report.malformed.add(str(left_out).partition("\n")[0])


def build_samples(
    source: str | Path,
    tokenizer: Tokenizer,
    options: SampleOptions,
    progress: Progress | None = None,
) -> SampleSet:
    """Reads, encodes and accounts for a whole data source.

    Raises:
        DataError: as `read_records` and `encode_rows`; also where nothing would be trained or more than
            options.max_dropped_fraction of the rows were left out.
    """
    report = DataReport(str(source), options.max_length)
    samples: list[Sample] = []
    done = 0
    for _, encoded in encode_rows(source, tokenizer, options, report):
        samples += encoded.samples
        done += 1
        if progress is not None and done % PROGRESS_EVERY == 0:
            progress(done, None, "encoding rows")
    report.finish([len(sample) for sample in samples])
    if progress is not None:
        progress(done, done, "encoding rows")
    report.check(options.max_dropped_fraction)
    return SampleSet(tuple(samples), report, fingerprint_of(samples))
