"""Supervised fine-tuning: conversations or documents to packed batches, cross-entropy on the answers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from oarsmith.config.groups import DataKeys
from oarsmith.config.sft import SftConfig
from oarsmith.data.dataset import Progress as DataProgress
from oarsmith.data.dataset import SampleSet, build_samples
from oarsmith.data.loader import Loader
from oarsmith.data.rows import fingerprint_of
from oarsmith.data.samples import Sample, SampleOptions
from oarsmith.losses.token import token_cross_entropy
from oarsmith.methods.data import TrainingData, first_batches, hold_out
from oarsmith.methods.generation import Question, read_questions
from oarsmith.text import Tokenizer
from oarsmith.training.batches import BatchSet
from oarsmith.training.objective import Objective

OBJECTIVE: Objective = token_cross_entropy


def sample_options(config: DataKeys) -> SampleOptions:
    """Encoding options."""
    return SampleOptions(
        max_length=config.max_length,
        src_length=config.src_length,
        train_on=config.train_on,
        dataset_format=None if config.dataset_format == "auto" else config.dataset_format,
        on_malformed=config.on_malformed,
        max_dropped_fraction=config.max_dropped_fraction,
    )


def build_data(config: SftConfig, tokenizer: Tokenizer, progress: DataProgress | None = None) -> TrainingData:
    """Read, encode and pack the rows to train, evaluate and test on.

    Raises:
        DataError: a malformed row, nothing to train on, or too many rows left out.
    """
    options = sample_options(config)
    source = config.dataset_name_or_path
    split = "train" if Path(source).is_dir() else None
    train = build_samples(source, tokenizer, replace(options, split=split), progress)
    evaluation = _evaluation_samples(config, tokenizer, options, progress)
    test = build_samples(source, tokenizer, replace(options, split="test"), progress) if config.do_predict else None
    samples, held_out = train.samples, () if evaluation is None else evaluation.samples
    if evaluation is None and config.eval_split_ratio > 0:
        samples, held_out = hold_out(train.samples, config.eval_split_ratio, config.seed)
    reports: dict[str, object] = {"train": train.report.to_dict()}
    lines = list(train.report.lines())
    for name, title, part in (("eval", "evaluation", evaluation), ("test", "test", test)):
        if part is not None:
            reports[name] = part.report.to_dict()
            lines += [f"{title}: {line}" for line in part.report.lines()]
    if evaluation is None and held_out:
        lines.append(f"evaluation: {len(held_out):,} of these samples are held out")
    tested = () if test is None else test.samples
    return TrainingData(
        train=Loader(
            samples,
            rows_per_batch=config.per_device_train_batch_size or 1,
            capacity=options.max_length,
            packing=config.zero_padding,
            seed=config.seed,
            fingerprint=fingerprint_of(samples),
        ),
        evaluation=_batch_set(held_out, config),
        test=_batch_set(tested, config),
        reports=reports,
        lines=lines,
        highest_id=max((int(sample.ids.max()), sample.where) for sample in (*samples, *held_out, *tested)),
    )


def evaluation_questions(config: SftConfig, rows: Collection[str]) -> list[Question]:
    """Of the ``rows`` (file:line) that a run is evaluated on, those with an answer to compare with."""
    options = sample_options(config)
    source, split = config.eval_dataset_path, None
    if source is None:
        source = config.dataset_name_or_path
        if Path(source).is_dir():
            split = "train" if config.eval_split_ratio > 0 else "dev"
    return read_questions(
        source,
        split=split,
        dataset_format=options.dataset_format,
        on_malformed=options.on_malformed,
        only=rows,
    )


def _evaluation_samples(
    config: SftConfig, tokenizer: Tokenizer, options: SampleOptions, progress: DataProgress | None
) -> SampleSet | None:
    if config.eval_dataset_path is not None:
        return build_samples(config.eval_dataset_path, tokenizer, options, progress)
    source = config.dataset_name_or_path
    if not Path(source).is_dir() or config.evaluation_strategy == "no" or config.eval_split_ratio > 0:
        return None
    return build_samples(source, tokenizer, replace(options, split="dev"), progress)


def _batch_set(samples: tuple[Sample, ...], config: SftConfig) -> BatchSet | None:
    """The samples in their order, at most ``max_evaluate_steps`` batches of them."""
    if not samples:
        return None
    loader = Loader(
        samples,
        rows_per_batch=config.per_device_eval_batch_size,
        capacity=config.max_length,
        packing=config.zero_padding,
        seed=config.seed,
        shuffle=False,
    )
    return first_batches(loader, config.max_evaluate_steps)
