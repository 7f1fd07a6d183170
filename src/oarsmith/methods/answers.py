"""Data of the methods that train on judged answers: rows to train, evaluate and test on, and their packed batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from oarsmith.config.preferences import PreferenceDataKeys
from oarsmith.config.train import TrainConfig
from oarsmith.data.answer_samples import AnswerOptions
from oarsmith.data.answer_sets import AnswerSet, build_answers
from oarsmith.data.answers import Answered, make_answer_batch
from oarsmith.data.dataset import Progress
from oarsmith.data.judged import Kind
from oarsmith.data.loader import Loader
from oarsmith.methods.data import TrainingData, first_batches, hold_out
from oarsmith.text import Tokenizer
from oarsmith.training.batches import BatchSet


@dataclass(frozen=True, kw_only=True)
class AnswerRows:
    """Rows by what they are for, and the account of where they came from (``TrainingData``)."""

    train: tuple[Answered, ...]
    evaluation: tuple[Answered, ...]
    test: tuple[Answered, ...]
    reports: dict[str, object]
    lines: list[str]

    @property
    def all(self) -> tuple[Answered, ...]:
        """In the order in which reference log-probabilities are kept."""
        return (*self.train, *self.evaluation, *self.test)


def answer_options(
    keys: PreferenceDataKeys, *, kind: Kind, mismatched: bool = False, share: bool = True, step_separator: str = "\n"
) -> AnswerOptions:
    """Encoding options; ``share``: whether the model reads a prompt once for its answers (``shares_beginnings``)."""
    return AnswerOptions(
        kind=kind,
        mismatched=mismatched,
        share=share,
        step_separator=step_separator,
        max_length=keys.max_length,
        max_prompt_len=keys.max_prompt_len,
        on_malformed=keys.on_malformed,
        max_dropped_fraction=keys.max_dropped_fraction,
    )


def read_rows(
    keys: PreferenceDataKeys,
    training: TrainConfig,
    tokenizer: Tokenizer,
    options: AnswerOptions,
    progress: Progress | None = None,
) -> AnswerRows:
    """Read and encode the rows to train, evaluate and test on.

    Raises:
        DataError: a malformed row, nothing to train on, or too many rows left out.
    """
    source, is_folder = keys.dataset_name_or_path, Path(keys.dataset_name_or_path).is_dir()
    train = build_answers(source, tokenizer, replace(options, split="train" if is_folder else None), progress)
    evaluation: AnswerSet | None = None
    if keys.eval_dataset_path is not None:
        evaluation = build_answers(keys.eval_dataset_path, tokenizer, options, progress)
    elif is_folder and training.evaluation_strategy != "no" and keys.eval_split_ratio == 0:
        evaluation = build_answers(source, tokenizer, replace(options, split="dev"), progress)
    test = build_answers(source, tokenizer, replace(options, split="test"), progress) if training.do_predict else None
    rows, held_out = train.rows, () if evaluation is None else evaluation.rows
    lines = list(train.report.lines())
    reports: dict[str, object] = {"train": train.report.to_dict()}
    for name, title, part in (("eval", "evaluation", evaluation), ("test", "test", test)):
        if part is not None:
            reports[name] = part.report.to_dict()
            lines += [f"{title}: {line}" for line in part.report.lines()]
    if evaluation is None and keys.eval_split_ratio > 0:
        rows, held_out = hold_out(train.rows, keys.eval_split_ratio, training.seed)
        lines.append(f"evaluation: {len(held_out):,} of these samples are held out")
    tested = () if test is None else test.rows
    return AnswerRows(train=rows, evaluation=held_out, test=tested, reports=reports, lines=lines)


def training_data(
    rows: AnswerRows, keys: PreferenceDataKeys, training: TrainConfig, *, share: bool = True
) -> TrainingData:
    """The rows in packed batches."""

    def loader(of: Sequence[Answered], rows_per_batch: int, shuffle: bool) -> Loader:
        return Loader(
            of,
            make=partial(make_answer_batch, share=share),
            lengths=[row.size(share=share) for row in of],
            rows_per_batch=rows_per_batch,
            capacity=keys.max_length,
            packing=keys.zero_padding,
            seed=training.seed,
            shuffle=shuffle,
        )

    def held_out(of: Sequence[Answered]) -> BatchSet | None:
        """In their order, at most ``max_evaluate_steps`` batches of them."""
        if not of:
            return None
        return first_batches(loader(of, training.per_device_eval_batch_size, False), training.max_evaluate_steps)

    return TrainingData(
        train=loader(rows.train, training.per_device_train_batch_size or 1, True),
        evaluation=held_out(rows.evaluation),
        test=held_out(rows.test),
        reports=rows.reports,
        lines=rows.lines,
        highest_id=max((row.highest_id, row.where) for row in rows.all),
    )
