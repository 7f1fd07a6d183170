"""What ``oarsmith dpo``, ``kto`` and ``reward`` share: rows with judged answers, and the reference's view of them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from rich.console import Console

from oarsmith.adapters.linear import disabled
from oarsmith.adapters.parts import rewrite_of
from oarsmith.checkpoint.fingerprint import fingerprint
from oarsmith.config.dpo import JudgedConfig
from oarsmith.data.answers import with_references
from oarsmith.data.judged import Kind
from oarsmith.jobs.row_progress import RowProgress
from oarsmith.jobs.start import Start
from oarsmith.methods.answers import AnswerRows, answer_options, read_rows, training_data
from oarsmith.methods.data import TrainingData
from oarsmith.methods.reference import compute_references, keep_references, read_references, reference_file
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.sharing import shares_beginnings
from oarsmith.text import Tokenizer
from oarsmith.training.numbers import show_duration

# Tokens of a batch without gradient.
_CAPACITY = 4096


@dataclass(frozen=True, kw_only=True)
class JudgedData(TrainingData):
    """With the rows themselves; ``share``: whether a prompt lies in a batch once."""

    rows: AnswerRows
    share: bool


def build_data(
    config: JudgedConfig,
    begin: Start,
    tokenizer: Tokenizer,
    *,
    kind: Kind,
    mismatched: bool,
    step_separator: str = "\n",
) -> JudgedData:
    """Rows in packed batches, which know nothing of the reference yet."""
    family, spec = families.build_spec(begin.config)
    share = shares_beginnings(rewrite_of(config, begin.base)(family, spec) if config.has_adapter else spec)
    options = answer_options(config, kind=kind, mismatched=mismatched, share=share, step_separator=step_separator)
    rows = read_rows(config, config, tokenizer, options)
    made = training_data(rows, config, config, share=share)
    return JudgedData(**vars(made), rows=rows, share=share)


def with_reference(
    config: JudgedConfig, begin: Start, model: Decoder, data: TrainingData, console: Console
) -> TrainingData:
    """The data with log-probabilities under the model that training begins with, without an adapter; they are kept on
    disk for the next run."""
    assert isinstance(data, JudgedData), data
    rows = data.rows.all
    form = config.weight_quantize_algo if config.has_adapter else "none"
    settings = (config.weight_blocksize, config.weight_double_quant, config.weight_double_quant_block_size)
    file = reference_file(
        rows, f"{fingerprint(begin.base)} {config.dtype} {form} {settings} {begin.config} {data.share}"
    )
    found = read_references(file, rows)
    if found is not None:
        console.print(f"reference: {found.size:,} answers, kept from an earlier run")
    else:
        begun, capacity = time.monotonic(), max(_CAPACITY, config.max_length)
        quiet = config.disable_tqdm
        with disabled(model), RowProgress(console, 0, len(rows), "reference", quiet=quiet) as progress:
            found = compute_references(model, rows, share=data.share, capacity=capacity, told=progress.add)
        keep_references(file, found)
        console.print(f"reference: {found.size:,} answers in {show_duration(time.monotonic() - begun)}")
    scored = with_references(rows, found)
    first, second = len(data.rows.train), len(data.rows.train) + len(data.rows.evaluation)
    known = replace(data.rows, train=scored[:first], evaluation=scored[first:second], test=scored[second:])
    return JudgedData(**vars(training_data(known, config, config, share=data.share)), rows=known, share=data.share)
