"""Pretraining: rows of an indexed corpus, cross-entropy on every token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from oarsmith.config.pretrain import PretrainConfig, split_shares
from oarsmith.data.corpus.cache import IndexCache
from oarsmith.data.corpus.loader import CorpusLoader, batches_in_pass, evaluation_batches
from oarsmith.data.corpus.parts import Corpus, CorpusPart
from oarsmith.data.corpus.samples import Part
from oarsmith.methods.data import TrainingData
from oarsmith.training.batches import BatchSet

# PaddleNLP's eval_iters and test_iters: batches of one evaluation, and of the final test.
EVALUATION_BATCHES, TEST_BATCHES = 10, 100


def build_data(config: PretrainConfig, vocab_size: int, opening: Sequence[int] = ()) -> TrainingData:
    """Open the corpus and lay out the samples of its parts.

    Args:
        opening: ids in front of every row, or of every document where they are apart (see ``make_corpus_batch``).

    Raises:
        DataError: files that are missing or malformed, or a part too small for a sample.
    """
    corpus = Corpus(config.input_dir, shares=split_shares(config.split), seq_len=config.max_length)
    cache = IndexCache(
        data_cache=None if config.data_cache is None else Path(config.data_cache), share_folder=config.share_folder
    )
    rows = config.per_device_train_batch_size or 1
    reports: dict[str, object] = {}
    lines: list[str] = []

    def draw(part: Part, num_samples: int) -> CorpusPart:
        # What is evaluated on is the same for every seed, so that runs with different ones can be compared.
        drawn = corpus.draw(part, num_samples, seed=config.seed if part == "train" else 0, cache=cache)
        reports[part] = drawn.report().to_dict()
        lines.extend(drawn.report().lines())
        return drawn

    def held_out(part: Part, limit: int) -> BatchSet:
        corpus.require(part)
        most = corpus.samples_in_pass(part)
        count = most if limit < 0 else min(most, limit * config.per_device_eval_batch_size)
        return evaluation_batches(
            draw(part, count),
            rows_per_batch=config.per_device_eval_batch_size,
            isolate_documents=config.isolate_documents,
            vocab_size=vocab_size,
            opening=opening,
        )

    train = CorpusLoader(
        draw("train", num_training_samples(config, corpus)),
        rows_per_batch=rows,
        isolate_documents=config.isolate_documents,
        vocab_size=vocab_size,
        opening=opening,
    )
    limit = config.max_evaluate_steps
    return TrainingData(
        train=train,
        evaluation=held_out("valid", limit if limit > 0 else EVALUATION_BATCHES)
        if config.do_eval or config.evaluation_strategy != "no"
        else None,
        test=held_out("test", limit if limit > 0 else TEST_BATCHES) if config.do_predict else None,
        reports=reports,
        lines=lines,
        highest_id=corpus.highest_id(),
    )


def num_training_samples(config: PretrainConfig, corpus: Corpus) -> int:
    """Samples that the steps or the epochs of the run can use."""
    rows = config.per_device_train_batch_size or 1
    if config.max_steps > 0:
        return config.max_steps * config.gradient_accumulation_steps * rows
    corpus.require("train")
    in_pass = batches_in_pass(corpus.samples_in_pass("train"), rows)
    return math.ceil(config.num_train_epochs) * in_pass * rows
